"""The kernels of native.c, linear.c and attention.c, compiled once for this machine, kept in the user's cache folder.

Each function here has the meaning of its namesake in `kernels.py`, which serves where there is no C compiler and for
types that native.c does not know. The code generator chooses, so the emitted text says which one runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sagellm.backends.aten.columns import AtenRows, Parts
from sagellm.backends.aten.int8 import Int8
from sagellm.backends.cpu import packing
from sagellm.backends.cpu.packing import Packed

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "linear.c", "attention.c"))
HEADER = SOURCES[0].with_suffix(".h")
# -fopenmp finds the libgomp that torch has loaded, so both use one pool of threads.
FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

P, L, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "rms_norm": (P, L, P, P, L, L, L, F),
    "add_rms_norm": (P, P, P, P, P, L, L, F),
    "silu_mul": (P, P, L, L),
    "rope": (P, L, P, P, L, L, L),
    "kv_write": (P, L, P, P, L, L, L, L),
    "rope_kv_write": (P, L, P, L, P, L, P, P, P, F, P, P, P, P, P, L, L, L, L, L, L),
    "gemv": (P, P, P, P, L, L),
    "attend": (P, L, P, P, P, P, L, P, P, L, L, L, L, L, L, L, F, P, P),
    "merge": (P, P, P, P, L, L, L),
    "linear": (P, P, P, P, L, L, L),
}


class Unavailable(Exception):
    """Why there are no native kernels here, in one line."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sagellm"


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. A build takes about a second, once per machine and version of the source."""
    compiler = os.environ.get("CC", "cc")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"no C compiler ({compiler}): {error}") from error
    key = b"\0".join(
        [
            *(source.read_bytes() for source in (HEADER, *SOURCES)),
            version,
            " ".join(FLAGS).encode(),
            _processor().encode(),
        ]
    )
    path = cache_folder() / f"native-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not path.exists():
        _build(compiler, path)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"cannot load {path} (remove it to build it again): {error}") from error
    for name, arguments in SIGNATURES.items():
        for suffix in DTYPES.values():
            function = getattr(found, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), platform.processor())
    except OSError:
        return platform.processor()


def _build(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, check=True, text=True)
            made.replace(path)
    except OSError as error:
        raise Unavailable(f"cannot write {path.parent}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} failed: {(error.stderr.strip().splitlines() or ['?'])[0]}") from error


@cache
def unavailable() -> str | None:
    """Why there are no native kernels here; None where there are."""
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None


@cache
def _function(name: str, dtype: torch.dtype):
    return getattr(library(), f"{name}_{DTYPES[dtype]}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, N] normalised over N."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, n = x.shape
    f = _function("rms_norm", x.dtype)
    f(x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), rows, 1, n, eps)
    return y


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H * D], each head normalised over D; rows may be apart."""
    rows, width = x.shape
    n = weight.shape[0]
    y = torch.empty((rows, width), dtype=x.dtype)
    f = _function("rms_norm", x.dtype)
    f(x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), rows, width // n, n, eps)
    return y


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T, N]: the sum, and its norm."""
    x, y = x.contiguous(), y.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, n = x.shape
    f = _function("add_rms_norm", x.dtype)
    f(x.data_ptr(), y.data_ptr(), weight.data_ptr(), total.data_ptr(), normed.data_ptr(), rows, n, eps)
    return total, normed


def silu_mul(x: Tensor) -> Tensor:
    """[T, 2 N] -> [T, N]"""
    x = x.contiguous()
    rows, width = x.shape
    y = torch.empty((rows, width // 2), dtype=x.dtype)
    _function("silu_mul", x.dtype)(x.data_ptr(), y.data_ptr(), rows, width // 2)
    return y


def rope(q: Tensor, k: Tensor, angles: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """[T, heads * D] each, rows may be apart; angles [T, D] float32, cos then sin."""
    f, at = _function("rope", q.dtype), angles.data_ptr()
    turned = []
    for x in (q, k):
        rows, width = x.shape
        y = torch.empty((rows, width), dtype=x.dtype)
        f(x.data_ptr(), x.stride(0), at, y.data_ptr(), rows, width // head_dim, head_dim)
        turned.append(y)
    return turned[0], turned[1]


def _memory(kv: tuple[Tensor, Tensor] | tuple[Int8, Int8]) -> tuple[int, int, bool]:
    """Where keys and values lie, and whether they are int8 with scales."""
    int8 = isinstance(kv[0], Int8)
    keys, values = (x.packed if isinstance(x, Int8) else x for x in kv)
    return keys.data_ptr(), values.data_ptr(), int8


def kv_write(kv: tuple[Tensor, Tensor], k: Tensor, v: Tensor, rows) -> None:
    """[T, KV heads * D] to the rows' slots; tokens that several sequences share go to several slots."""
    if rows.kv_source is not None:
        k, v = k[rows.kv_source], v[rows.kv_source]
    f, slots, shape = _function("kv_write", k.dtype), rows.slots.data_ptr(), kv[0].shape[2:]
    keys, values, int8 = _memory(kv)
    f(k.data_ptr(), k.stride(0), keys, slots, len(k), *shape, int8)
    f(v.data_ptr(), v.stride(0), values, slots, len(v), *shape, int8)


def rope_kv_write(
    kv: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor,
    rows: AtenRows,
    head_dim: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Queries rotated, keys rotated and written with the values; all [T, heads * D], rows may be apart."""
    count, width = q.shape
    y = torch.empty((count, width), dtype=q.dtype)
    q_norm, k_norm, eps = (
        (None, None, 0.0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr(), norms[2])
    )
    source = None if rows.kv_source is None else rows.kv_source.data_ptr()
    keys, values, int8 = _memory(kv)
    _function("rope_kv_write", q.dtype)(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), angles.data_ptr(),
        q_norm, k_norm, eps, y.data_ptr(), keys, values, rows.slots.data_ptr(), source,
        count, len(rows.slots) - count, width // head_dim, k.shape[1] // head_dim, head_dim, int8,
    )  # fmt: skip
    return y


def pack_onednn(weight: Tensor) -> Packed:
    """As in `kernels`, and open to `gemv` where its bytes lie as native.c expects, which is tried out here.

    oneDNN chooses blocks of 64 outputs for most matrices, and others for small ones.
    """
    packed = packing.pack_onednn(weight)
    outputs, inputs = weight.shape
    if outputs % 64 or inputs % 2:
        return packed
    x = torch.linspace(-1, 1, inputs, dtype=weight.dtype)[None]
    packed.address = torch.ops.mkldnn.data_ptr(packed.tensor)
    ours, theirs = linear_onednn(x, packed, None).float(), packing.linear_onednn(x, packed, None).float()
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
        packed.address = None
    return packed


def linear_onednn(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """One row [1, in] by a pass over the weights at the memory's speed; more rows by oneDNN."""
    if x.shape[0] != 1 or weight.address is None:
        return packing.linear_onednn(x, weight, bias)
    y = torch.empty((1, weight.outputs), dtype=x.dtype)
    at = None if bias is None else bias.data_ptr()
    _function("gemv", x.dtype)(x.data_ptr(), weight.address, at, y.data_ptr(), weight.outputs, x.shape[1])
    return y


def decode_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, scale: float, window: int | None = None
) -> Tensor:
    """One query a sequence, [D, H * head size], over the blocks where they lie."""
    return _attend(q, kv, rows, rows.parts(window), scale)


def cascade_attention(q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, scale: float) -> Tensor:
    """As `decode_attention`; what a cohort shares is read once for all of its rows."""
    return _attend(q, kv, rows, rows.cascade_parts(), scale)


def tree_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, scale: float, window: int | None = None
) -> Tensor:
    """Decodes without guesses first, then trees of guesses [T, H * D]: a node's result is bit for bit that of the plain
    decode row that it stands for."""
    return _attend(q, kv, rows, rows.tree_parts(window), scale)


def _attend(q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, parts: Parts, scale: float) -> Tensor:
    _, block_size, kv_heads, head_dim = kv[0].shape
    keys, values, int8 = _memory(kv)
    heads = q.shape[1] // head_dim
    out = torch.empty((len(parts.members), heads * head_dim), dtype=torch.float32)
    lse = torch.empty((len(parts.members), heads), dtype=torch.float32)
    _function("attend", q.dtype)(
        q.data_ptr(), q.stride(0), keys, values, parts.members.data_ptr(),
        parts.blocks.data_ptr(), parts.blocks.shape[1], parts.table.data_ptr(), parts.paths.data_ptr(),
        parts.paths.shape[1], len(parts.table),
        kv_heads, heads // kv_heads, head_dim, block_size, int8, scale, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    if parts.other is None:
        return out.to(q.dtype)
    joined = torch.empty((len(parts.other), heads * head_dim), dtype=q.dtype)
    f = _function("merge", q.dtype)
    f(out.data_ptr(), lse.data_ptr(), parts.other.data_ptr(), joined.data_ptr(), len(joined), heads, head_dim)
    return joined


def pack_panels(weight: Tensor) -> Packed:
    return packing.pack_panels(weight)


def linear_panels(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """[T, in] times a matrix in panels."""
    wide = x.float().contiguous()
    y = torch.empty((x.shape[0], weight.outputs), dtype=x.dtype)
    at = None if bias is None else bias.data_ptr()
    f = _function("linear", x.dtype)
    f(wide.data_ptr(), weight.tensor.data_ptr(), at, y.data_ptr(), *y.shape, x.shape[1])
    return y
