"""`sage llm ...` and `sage infer`; every other word goes to the SAGE that is installed beside this, if one is."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from sagellm.cli import main as sagellm

OURS = "sage-llm"
LLM = ("engine", "serve", "gateway", "control-plane")
"""Commands of `sagellm` that are also ones of `sage llm`."""
USAGE = f"""Usage: sage llm {{{"|".join(LLM)}}} ... | sage infer PROMPT

  sage llm engine start MODEL --engine-kind sagellm --device ascend
  sage llm serve MODEL --backend ascend --kv-schema int8
  sage infer PROMPT
"""


def main() -> None:
    words = sys.argv[1:]
    match words:
        case ["llm", first, *rest] if first in LLM:
            sagellm([first, *rest], prog_name="sage llm")
        case ["infer", *rest]:
            sagellm(["infer", *rest], prog_name="sage")
        case [] | ["llm", *_] | ["-h" | "--help"]:
            known = words[:1] != ["llm"] or words[1:] in ([], ["-h"], ["--help"])
            print(USAGE, end="", file=sys.stdout if known else sys.stderr)
            sys.exit(0 if known else 2)
        case _:
            _other(words[0])


def _other(word: str) -> None:
    """What another distribution's `sage` does with this command line."""
    for script in entry_points(group="console_scripts", name="sage"):
        if script.dist is not None and script.dist.name != OURS:
            script.load()()
            return
    print(f"sage: error: unknown command {word!r}; accepted: llm, infer", file=sys.stderr)
    sys.exit(2)
