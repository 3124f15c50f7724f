"""`sagellm verify-backend`: is what a vendor's code generator emits what the vendor's libraries take?"""

from __future__ import annotations

import multiprocessing
import sys

import click

from sagellm.conformance.verify import contract_of, main
from sagellm.models.hub import resolve


@click.command("verify-backend")
@click.argument("target")
@click.option("--model", help="A model's folder or name.  [default: small random models of each family]")
@click.option(
    "--mutations",
    type=click.IntRange(1, 100_000),
    help="Instead, put so many random errors into emitted programs and count those that are caught.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the random errors.", show_default=True)
def verify_backend(target: str, model: str | None, mutations: int | None, seed: int) -> None:
    """Check a vendor's backend, such as ascend, ascend:310P or dcu+kernels, without its chip.

    Every call that the engine makes is bound to the vendor's schema, checked by the rules of its hardware, and
    computed by a reference, over prompts, decodes, shared beginnings, trees of guesses and preemption; the logits are
    compared with the CPU backend's. For Ascend the same is then done through torch_npu's own host code, over a fake
    CANN that is built from its wheel. Each runs in a process of its own, as they take the vendor's names.
    """
    contract = contract_of(target)
    folder = str(resolve(model)) if model else ""
    runs = [("stand_in", folder), ("host_code", folder)] if contract.host_code else [("stand_in", folder)]
    if mutations is not None:
        runs = [("mutations", str(mutations))]
    processes = multiprocessing.get_context(
        "fork" if sys.platform == "linux" else "spawn"
    )  # fork has torch already
    failed = False
    for layers, argument in runs:
        process = processes.Process(target=main, args=(layers, target, argument, str(seed)))
        process.start()
        process.join()
        failed |= process.exitcode != 0
    raise SystemExit(int(failed))
