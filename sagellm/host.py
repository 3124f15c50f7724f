"""What this process may use of its machine: less than there is, in a container or a service with limits. Leaf."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group, of version 2 and 1: its limit, what it uses, and what of that is pages of files, which go
first (a line of memory.stat)."""


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be had without swapping: what the kernel estimates, else the free pages; within the limits of the
    control groups that this process is in."""
    estimate = _line(root / "proc/meminfo", "MemAvailable:")
    if estimate is None:
        estimate = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    left = [1024 * estimate]
    for group in _groups("memory", root):
        for limit, used, files in MEMORY:
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                left.append(most - now + (_line(group / "memory.stat", files) or 0))
    return max(0, min(left))


def processors(root: Path = ROOT) -> int:
    """Those that this process may run on, at most as many as its control groups give it the time of; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", root):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        with suppress(OSError, ValueError):  # version 2: both in one file, "max" for no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
        if quota and period and quota > 0:
            count = min(count, math.ceil(quota / period))
    return max(1, count)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's control groups, innermost first, in version 2's one tree or the controller's own.

    A path that is told from outside of a container does not exist in it; the top of its tree does.
    """
    top = root / "sys/fs/cgroup"
    lines = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = top / controller if controllers else top
        inside = tree / path.lstrip("/") if ".." not in path else tree
        yield from (one for one in (inside, *inside.parents) if one.is_relative_to(tree) and one.is_dir())


def _number(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _line(file: Path, name: str) -> int | None:
    """The number behind this name."""
    with suppress(OSError, StopIteration):
        lines = map(str.split, file.read_text().splitlines())
        return next(int(words[1]) for words in lines if words[:1] == [name])
    return None
