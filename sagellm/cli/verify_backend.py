"""`sagellm verify-backend`: is what a vendor's code generator emits what the vendor's libraries take?"""

from __future__ import annotations

import subprocess
import sys

import click

from sagellm.conformance.verify import contract_of
from sagellm.models.hub import resolve


@click.command("verify-backend")
@click.argument("target")
@click.option("--model", help="A model's folder or name.  [default: small random models of each family]")
def verify_backend(target: str, model: str | None) -> None:
    """Check a vendor's backend, such as ascend or ascend:310P, without its chip.

    Every call that the engine makes is bound to the vendor's schema, checked by the rules of its hardware, and
    computed by a reference, over prompts, decodes, shared beginnings, trees of guesses and preemption; the logits are
    compared with the CPU backend's. It runs in a process of its own, as stand-ins take the vendor's names.
    """
    contract_of(target)
    folder = str(resolve(model)) if model else ""
    code = f"import sys; from sagellm.conformance.verify import main; sys.exit(main({target!r}, {folder!r}))"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
