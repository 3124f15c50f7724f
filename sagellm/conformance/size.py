"""How large a vendor's folder is, against the bar that docs/architecture.md sets."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from attrs import frozen

from sagellm import backends
from sagellm.backends.aten.codegen import STOCK

LINES, ENTRIES = 1500, 25
"""The bar."""
NOT_COUNTED = ("kernels.py", "contract.py")


@frozen
class Size:
    """Of one vendor's folder."""

    target: str
    lines: int
    """Of Python, but kernels and contract."""
    entries: int
    """Operations for which its kernel tables have a line of their own; one for each such line."""

    @property
    def within(self) -> bool:
        return self.lines <= LINES and self.entries <= ENTRIES


def sizes() -> list[Size]:
    """Of every backend of this tree that makes a vendor's calls."""
    found = []
    for target, (package, _, _) in ((t, where.partition(":")) for t, where in backends.BACKENDS.items()):
        if backends.load(target).contract is None:
            continue
        folder = Path(import_module(package).__path__[0])
        files = [path for path in folder.rglob("*.py") if path.name not in NOT_COUNTED]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        tables = [
            t for name, t in vars(import_module(f"{package}.codegen")).items() if name.startswith("KERNELS")
        ]
        own = {(op, line) for table in tables for op, line in table.items() if STOCK.get(op) is not line}
        found.append(Size(target, lines, len(own)))
    return found
