"""The layers of proof for a vendor's backend, each with what it saw. Runs in a process of its own."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import define

from sagellm import backends
from sagellm.backends import networks
from sagellm.backends.comm import open_store
from sagellm.backends.contract import CONFIDENCE, Contract
from sagellm.conformance import models, mutations, operations, scenario, stand_in
from sagellm.errors import UserError
from sagellm.models.config import load_config

EXACT = 1e-5
"""Largest distance of logits in float32, as a part of the largest logit."""
ROUNDED = 1.5
"""In the model's own type: mean distance from float32, as a part of the CPU's, whose kernels round less often."""

CAUGHT = 0.95
"""Least part of the errors that has to be caught."""
STEPS = 1
"""Of int8, where a value lies between two of them: kernels round before they quantise, or do not."""
APART = {"bfloat16": 2e-2, "float16": 2.5e-3}
"""Mean distance of logits from the CPU backend's in the same type, as a part of the largest: some roundings."""


@define
class Finding:
    """What a layer saw of one model: `ok`, or a failure."""

    layer: str
    model: str
    ok: bool
    said: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.layer:<12} {self.model:<16} {self.said}"


def contract_of(target: str) -> Contract:
    """What the vendor's calls want; refused for a backend that makes no vendor calls."""
    found = backends.load(target).contract
    if found is None:
        raise UserError(f"backend {target!r} makes no vendor calls; accepted: one that has a contract")
    return found


def verify(
    target: str, folder: Path | None = None, families: Iterable[str] = tuple(models.FAMILIES)
) -> Iterator[Finding]:
    """Bind every emitted call, check the rules, and compare numbers with the CPU backend.

    `folder` is a checkpoint; without one, small random models of these families.
    """
    contract = contract_of(target)
    record = stand_in.install(contract)
    vendor = type(backends.load(target))
    vendor.device = "cpu"
    with _models(folder, families) as some:
        for name, where in some.items():
            if refusal := _refusal(target, name, where):
                yield Finding("constraints", name, folder is None, f"refused: {refusal}")
            else:
                yield from _numbers(target, name, where, record)
        if "int8" in backends.load(target).capability.kv_dtypes:
            yield from _int8_cache(target, *next(iter(some.items())))
    yield from _operations(target)
    if not contract.calls:
        yield Finding("bind", "all", True, "no vendor calls: stock torch on the vendor's device")
        return
    made = [call for call in contract.calls if record.counts[call.name]]
    letters = sorted({call.confidence for call in made})
    known = "; ".join(f"{letter}: {CONFIDENCE[letter]}" for letter in letters)
    total = sum(record.counts.values())
    yield Finding("bind", "all", True, f"{total} calls of {len(made)} kinds bound ({known})")
    rules = sum(len(call.rules) for call in made)
    yield Finding("constraints", "all", True, f"{rules} rules held for each of them")


def _refusal(target: str, name: str, folder: Path) -> str | None:
    """Why the chip does not take a model at all; None where it does."""
    backend = backends.load(target)
    try:
        if backend.silicon is not None:
            backend.silicon.check(backend.capability.dtypes[0], load_config(folder, name).head_dim)
    except UserError as error:
        return str(error)
    return None


@contextmanager
def _models(
    folder: Path | None, families: Iterable[str] = tuple(models.FAMILIES)
) -> Iterator[dict[str, Path]]:
    """This model, or small ones of these families."""
    if folder is not None:
        yield {folder.name: folder}
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield {name: models.write_model(Path(scratch) / name, name) for name in families}


def _numbers(target: str, name: str, folder: Path, record: stand_in.Record) -> Iterator[Finding]:
    vendor = type(backends.load(target))
    own = backends.load(target).capability.dtypes[0]
    size = backends.load(target).capability.block_sizes[0]
    told: dict[tuple[str, str], scenario.Transcript] = {}
    for where, dtype, widened in (
        (target, "float32", True),
        ("cpu", "float32", False),
        (target, own, False),
        ("cpu", own, False),
    ):
        vendor.widened = widened
        try:
            told[where, dtype] = scenario.run(where, folder, own if widened else dtype, block_size=size)
        except Exception as error:  # whatever the emitted text does wrong
            yield _failure(name, error)
            return
    exact = told["cpu", "float32"]
    ours = told[target, "float32"]
    most, _, count = scenario.worst(exact, ours)
    scale = max(float(logits.abs().max()) for logits in exact.logits.values())
    equal = exact.tokens == ours.tokens
    kinds = ", ".join(sorted({"+".join(words) for words in ours.kinds}))
    yield Finding(
        "numbers",
        name,
        equal and most <= EXACT * scale,
        f"the same text in float32: {count} logits at most {most / scale:.1e} of the largest apart, tokens "
        f"{'equal' if equal else 'DIFFER'} ({kinds}; {ours.preempted} put back, {ours.reused} tokens found)",
    )
    _, theirs, _ = scenario.worst(exact, told["cpu", own])
    _, mine, count = scenario.worst(exact, told[target, own])
    yield Finding(
        "numbers",
        name,
        mine <= ROUNDED * theirs,
        f"{own}: mean distance from float32 {mine / theirs:.2f} of the CPU backend's ({count} logits)",
    )


def _int8_cache(target: str, name: str, folder: Path) -> Iterator[Finding]:
    """One model over an int8 cache, in the backend's own type. Numbers at a rounding's edge fall to either side, so
    that logits are near the CPU backend's and not equal."""
    backend = backends.load(target)
    own, size = backend.capability.dtypes[0], backend.capability.block_sizes[0]
    try:
        ours, theirs = (
            scenario.run(where, folder, own, block_size=size, kv_dtype="int8") for where in (target, "cpu")
        )
    except stand_in.ContractBroken as error:
        yield Finding(error.layer, name, False, str(error))
        return
    _, mean, count = scenario.worst(theirs, ours)
    scale = max(float(logits.abs().max()) for logits in theirs.logits.values())
    yield Finding(
        "numbers",
        name,
        mean <= APART[own] * scale,
        f"int8 KV cache: {count} logits {mean / scale:.1e} of the largest from the CPU backend's on average",
    )


def _operations(target: str) -> Iterator[Finding]:
    """Those that the models do not have, in float32 and in the backend's own type."""
    vendor = type(backends.load(target))
    own = backends.load(target).capability.dtypes[0]
    for widened in (True, False):
        vendor.widened = widened
        try:
            ours = operations.compute(target, own)
        except Exception as error:  # as above
            yield _failure("operations", error)
            return
        finally:
            vendor.widened = False
        distance, steps = operations.apart(ours, operations.compute("cpu", "float32" if widened else own))
        yield Finding(
            "numbers",
            "operations",
            distance <= (EXACT if widened else APART[own]) and steps <= STEPS,
            f"{', '.join(ours)} in {'float32' if widened else own}: at most {distance:.1e} of the largest and {steps} "
            "steps of int8 apart",
        )


def verify_host_code(target: str, folder: Path | None = None) -> Iterator[Finding]:
    """Run the same over the vendor's own host code, where there is a fake device for it: shapes, kernels, numbers."""
    from sagellm.conformance.fake_cann.build import Unavailable
    from sagellm.conformance.fake_cann.load import fake_ascend

    backend = backends.load(target)
    own, size = backend.capability.dtypes[0], backend.capability.block_sizes[0]
    try:
        with fake_ascend(backend.chip) as seen, _models(folder) as some:
            wrong: list[str] = []
            for name, where in some.items():
                cpu = scenario.run("cpu", where, own, block_size=size)
                before, seen.wrong[:] = seen.calls.total(), []
                ours = scenario.run(target, where, own)
                said = f"{seen.calls.total() - before} vendor calls launched the kernels that were promised"
                wrong += seen.wrong
                yield Finding("trace", name, not seen.wrong, "; ".join(seen.wrong) or said)
                distance, mean, count = scenario.worst(cpu, ours)
                scale = max(float(logits.abs().max()) for logits in cpu.logits.values())
                yield Finding(
                    "trace", name, mean <= APART[own] * scale,
                    f"{own}: {count} logits {mean / scale:.1e} of the largest apart on average, {distance / scale:.1e} "
                    "at most",
                )  # fmt: skip
            # Slow, and the same text on every chip.
            if folder is None and "int8" in backend.capability.kv_dtypes:
                seen.wrong.clear()
                for finding in _int8_cache(target, *next(iter(some.items()))):
                    yield Finding("trace", finding.model, finding.ok and not seen.wrong, finding.said)
                wrong += seen.wrong
            seen.wrong.clear()
            distance, steps = _operations_alone(target, own)
            said = f"{own}: at most {distance:.1e} of the largest and {steps} steps of int8 apart"
            good = distance <= APART[own] and steps <= STEPS and not seen.wrong
            yield Finding("trace", "operations", good, "; ".join(seen.wrong) or said)
            wrong += seen.wrong
            yield Finding(
                "shape", "all", True, f"{seen.shapes} forms of calls agree with the vendor's inference"
            )
            kernels = (
                f"{len(seen.kernels)} kinds of kernels, none of an operator left to the CPU; {seen.replays} replays of "
                "captured graphs"
            )
            yield Finding("trace", "all", not wrong, "; ".join(wrong) or kernels)
            order = seen.order
            said = (
                f"{order.accesses} accesses of {order.streams} streams and the host are ordered where they meet; "
                f"{order.across} pairs met across streams"
            )
            yield Finding("order", "all", not order.wrong, "; ".join(order.wrong) or said)
    except Unavailable as error:
        yield Finding("trace", "all", True, f"NOT CHECKED: {error}")
    except Exception as error:  # as above
        yield _failure("all", error)


def _operations_alone(target: str, dtype: str) -> tuple[float, int]:
    """On the vendor's device, whose group has one rank; how far they are from the CPU backend's."""
    vendor = backends.load(target).vendor
    assert vendor is not None
    store = open_store(1)
    network = networks.connect(vendor, store.port, 0, 1)
    try:
        group = operations.Alone(network.group_name)
        ours = operations.compute(target, dtype, lambda work: [work(0, group)])
    finally:
        network.close()
    return operations.apart(
        ours, operations.compute("cpu", dtype, lambda work: [work(0, operations.Alone())])
    )


def _failure(model: str, error: Exception) -> Finding:
    """Of a scenario that did not come to its end: the first line says which rule is broken, or what was raised."""
    if isinstance(error, stand_in.ContractBroken):
        return Finding(error.layer, model, False, str(error))
    first = (str(error).splitlines() or [""])[0]
    return Finding("error", model, False, f"{type(error).__name__}: {first}")


def mutate(target: str, count: int, seed: int = 0) -> Iterator[Finding]:
    """How many of so many random errors in emitted programs are caught, and which are not."""
    contract = contract_of(target)
    stand_in.install(contract)
    vendor = type(backends.load(target))
    vendor.device, vendor.widened = "cpu", True
    by: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = models.write_model(Path(scratch) / "qwen3", "qwen3", rms_norm_eps=1e-2)  # so that it counts
        for mutant, layer in mutations.judge(target, folder, count, seed):
            by[layer or "none"] += 1
            if layer is None:
                yield Finding("mutation", "+".join(mutant.kinds), True, f"not caught: {mutant.what}")
    found = ", ".join(f"{layer} {n}" for layer, n in by.most_common() if layer != "none")
    passed = count - by["none"] >= CAUGHT * count
    yield Finding("mutation", "all", passed, f"{count - by['none']} of {count} errors caught ({found})")


def main(layers: str, target: str, argument: str, seed: str = "0") -> None:
    """Print the findings of `stand_in` or `host_code` over a folder, or of so many `mutations`; leaves with 1 if one is
    bad."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if layers == "mutations":
        findings = mutate(target, int(argument), int(seed))
    else:
        check = {"stand_in": verify, "host_code": verify_host_code}[layers]
        findings = check(target, Path(argument) if argument else None)
    good = True
    for finding in findings:
        print(finding, flush=True)
        good &= finding.ok
    sys.exit(0 if good else 1)
