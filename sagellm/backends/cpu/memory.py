"""Memory of the CPU: huge pages for what is read whole in every step, and bounds for the caches of libraries."""

from __future__ import annotations

import ctypes
import os
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


def bound_primitive_caches() -> None:
    """oneDNN, and ideep over it, keep up to 1,024 compiled primitives each, one for each number of tokens and weight.

    That is some 200 MiB even under a tiny model; with 128 it is 30 MiB. A value set from outside stays. It has to
    be called before the first matrix product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
