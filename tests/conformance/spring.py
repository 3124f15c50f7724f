"""Springs traps on a backend whose vendor's calls are stand-ins, in a process of its own, and says who noticed.

A step of each kind is recorded as the engine runs small models in float32. A trap edits the emitted text; the step is
then computed by it, and its logits and cache are compared with those of the text as it was.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import forked


def sprung(target: str, traps: dict[str, dict]) -> dict[str, str]:
    """Who noticed each trap: `bind`, `constraints`, `error` (torch), `refused` (the settings), `numbers`, or `nobody`.

    `traps` by name: `edits` of the text (pattern, replacement), each of which must fit some step, `transposed` for a
    cache whose heads and tokens have changed places, `block_size`, and the model's `family`. `code` in their place
    is run as it is, and puts into `found` what it saw. With `cpu`, all that the engine said is compared with what it
    says on the CPU backend.
    """
    done = forked.python("import spring; spring.main()", json.dumps({"target": target, "traps": traps}))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import torch

    from sagellm import backends
    from sagellm.backends.plan import Program
    from sagellm.conformance import models, scenario, stand_in
    from sagellm.conformance.verify import EXACT, contract_of
    from sagellm.errors import UserError

    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    target = given["target"]
    stand_in.install(contract_of(target))
    vendor = type(backends.load(target))
    vendor.device, vendor.widened = "cpu", True
    capability = backends.load(target).capability
    folder = Path(tempfile.mkdtemp())
    recorded: dict[str, dict] = {}
    said: dict[str, scenario.Transcript] = {}
    steps: dict = {}

    class Recording(scenario.SmallCore):
        def __init__(self, config):
            super().__init__(config)
            functions = self.executor.functions

            def function(name, words):
                run = functions(name, words)
                if (
                    name == "sample"
                    or words in steps
                    or min(len(self.executor._rows.tokens), len(self.executor._rows.outputs)) < 3
                ):
                    return run

                def once(weights, cache, rows):
                    source = self.compiler.model(words).program.source
                    copies = [(k.clone(), v.clone()) for k, v in cache]
                    steps[words] = source, weights, copies, self.executor._rows, self.columns.block_size
                    return run(weights, cache, rows)

                return once

            self.executor.functions = function

    scenario.SmallCore = Recording

    def record(family: str, **settings) -> dict:
        steps.clear()
        where = folder / family
        if not where.exists():
            models.write_model(where, family, num_hidden_layers=1)
        said[family] = scenario.run(target, where, capability.dtypes[0], **settings)
        return dict(steps)

    def compute(source: str, step, transposed: bool = False) -> list:
        _, weights, cache, rows, size = step
        cache = [
            tuple(x.transpose(1, 2).contiguous() if transposed else x.clone() for x in kv) for kv in cache
        ]
        with torch.inference_mode():
            logits = Program("edited", source, {})["model"](
                weights, cache, backends.load(target).upload(rows, size)
            )
        return [logits, *(x.transpose(1, 2) if transposed else x for kv in cache for x in kv)]

    def outcome(trap: dict) -> str:
        family, edits = trap.get("family", "qwen3"), trap.get("edits", ())
        if "block_size" in trap:
            record(family, block_size=trap["block_size"])
        if family not in recorded:
            recorded[family] = record(family)
        if trap.get("cpu"):
            exact = scenario.run("cpu", folder / family, "float32", block_size=capability.block_sizes[0])
            if exact.tokens != said[family].tokens:
                return "numbers"
            largest = max(float(x.abs().max()) for x in exact.logits.values())
            return "nobody" if scenario.worst(exact, said[family])[0] <= EXACT * largest else "numbers"
        fitted = set()
        noticed = "nobody"
        for words, step in recorded[family].items():
            source = step[0]
            for number, (pattern, replacement) in enumerate(edits):
                source, count = re.subn(pattern, replacement, source)
                fitted.update([number] if count else [])
            if "tree" in words or (source == step[0] and not trap.get("transposed") and edits):
                continue
            for ours, theirs in zip(
                compute(source, step, trap.get("transposed", False)), compute(step[0], step)
            ):
                if not (ours - theirs).abs().max() <= EXACT * theirs.abs().max():
                    noticed = "numbers"
        return noticed if len(fitted) == len(edits) else "an edit fits nowhere"

    found = {}
    for name, trap in given["traps"].items():
        scope: dict = {"torch": torch}
        try:
            if "code" in trap:
                exec(trap["code"], scope)
                found[name] = scope["found"]
            else:
                found[name] = outcome(trap)
        except stand_in.ContractBroken as error:
            found[name] = error.layer
        except UserError:
            found[name] = "refused"
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            found[name] = "error"
    print(json.dumps(found))
