"""Huge pages for memory that is read whole in every step."""

from __future__ import annotations

import ctypes
from functools import cache


def huge_pages(address: int, size: int) -> None:
    """Ask the kernel to back this memory with huge pages now.

    MADV_HUGEPAGE 14, MADV_COLLAPSE 25 (Linux 6.1). Where it cannot be had nothing changes.
    """
    first, end = -(-address // 4096) * 4096, (address + size) // 4096 * 4096
    if end <= first or not hasattr(_libc(), "madvise"):
        return
    for advice in (14, 25):
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
