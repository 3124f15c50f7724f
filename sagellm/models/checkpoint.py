"""A folder of safetensors files as one table of tensors: names and shapes at once, weights only when read.

Only safetensors: a pickle file (pytorch_model.bin, *.pt, *.pth) can run code when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sagellm.errors import UserError
from sagellm.models.config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes (https://github.com/huggingface/safetensors, tensor.rs)."""


class Checkpoint:
    """The tensors of a folder with `model.safetensors`, or with an index and its shards.

    Opening maps every file and reads its header; UserError where one is missing, cut short or malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._table = _table_file(self.folder)
        """The file that lists all tensors: the single one or the index."""
        if self._table == SINGLE:
            self._files = {SINGLE: _open(self.folder / SINGLE)}
            self._shard_of = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        else:
            self._shard_of = _weight_map(self.folder)
            self._files = {
                shard: _open(self.folder / shard) for shard in sorted(set(self._shard_of.values()))
            }
        self._held = {shard: frozenset(file.keys()) for shard, file in self._files.items()}

    def names(self) -> tuple[str, ...]:
        """All tensors, sorted."""
        return tuple(sorted(self._shard_of))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        found = self._file(name).get_slice(name).get_dtype()
        if found not in DTYPES:
            raise UserError(f"tensor {name!r} has dtype {found}; accepted: {', '.join(DTYPES)}")
        return DTYPES[found]

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its own dtype: a view of the mapped file, not to be written to."""
        return self._file(name).get_tensor(name)

    def read_part(self, name: str, dim: int, part: int, parts: int) -> torch.Tensor:
        """One of `parts` equal parts along `dim`; the others are not read."""
        found = self._file(name).get_slice(name)
        size = found.get_shape()[dim] // parts
        return found[(slice(None),) * dim + (slice(part * size, (part + 1) * size),)]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """UserError unless every expected tensor is there with its shape. Reads no weights."""
        missing = [name for name in expected if not self._holds(name)]
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(self._missing(missing[0]) + others)
        for name, shape in expected.items():
            if self.shape(name) != tuple(shape):
                where = self.folder / self._shard_of[name]
                raise UserError(
                    f"tensor {name!r} in {where} has shape {list(self.shape(name))}; accepted: {list(shape)}"
                )

    def _holds(self, name: str) -> bool:
        return name in self._shard_of and name in self._held[self._shard_of[name]]

    def _missing(self, name: str) -> str:
        return f"tensor {name!r} is missing from {self.folder / self._shard_of.get(name, self._table)}"

    def _file(self, name: str):
        if not self._holds(name):
            raise UserError(self._missing(name))
        return self._files[self._shard_of[name]]


def _table_file(folder: Path) -> str:
    """SINGLE or INDEX, whichever the folder has; the single file where it has both, as in transformers."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {str(folder)!r}; accepted: a folder with {SINGLE} or {INDEX}")
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return name
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = f"only pickle weights ({pickles[0]}), which are refused," if pickles else "no weights"
    raise UserError(
        f"{found} in {str(folder)!r}; accepted: only safetensors, {SINGLE} or {INDEX} with its shards"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it, from the index; every shard is there."""
    index = folder / INDEX
    shard_of = read_json(index).get("weight_map")
    if not shard_of or not isinstance(shard_of, dict):
        raise UserError(
            f"{index}: weight_map is missing, empty or no object; accepted: tensor names to file names"
        )
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(
                f"{index}: the file of tensor {name!r} is {shard!r}; accepted: a file name in the folder"
            )
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise UserError(
                f"{index} names {shard!r}, which is not in {str(folder)!r}; accepted: all shards present"
            )
    return shard_of


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        size, expected = path.stat().st_size, _size_by_header(path)
        if expected is not None and expected != size:
            raise UserError(
                f"{path} has {size} bytes; accepted: {expected} bytes, as its header says"
            ) from error
        raise UserError(
            f"{path} ({size} bytes) is not a safetensors file or is cut short: {error}"
        ) from error


def _size_by_header(path: Path) -> int | None:
    """Bytes that the file should have; None where the header itself cannot be read.

    The format: header length (8 bytes, little endian), JSON header, data at the header's offsets.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + length + max(ends)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            return None
