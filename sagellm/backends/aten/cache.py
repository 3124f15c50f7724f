"""The KV cache of all layers as one tensor on a device, in the layout that a vendor's kernels read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sagellm.backends.aten.beside import CopiesBeside
from sagellm.backends.aten.int8 import SCALE
from sagellm.schemas import KVCacheSchema

NHD, HND, NZ = "NHD", "HND", "NZ"
"""[blocks, block size, heads, D]; [blocks, heads, block size, D]; [blocks, heads * D / 16, block size, 16]."""
FRACTAL = 16
"""Values of a half type in the innermost dimension of NZ."""


class DeviceCache(list):
    """(keys, values) of each layer, as views of one tensor. A scale lies behind its numbers: D + 4 bytes of int8."""

    def __init__(self, schema: KVCacheSchema, blocks: int, device: str = "cpu", layout: str = NHD):
        size, heads, dim = schema.block_size, schema.num_kv_heads, schema.head_dim
        if schema.scale_dtype is not None:
            dim += SCALE
        shape = {
            NHD: (size, heads, dim),
            HND: (heads, size, dim),
            NZ: (heads * dim // FRACTAL, size, FRACTAL),
        }[layout]
        dtype = getattr(torch, schema.dtype)
        every = torch.zeros((schema.num_layers, 2, blocks, *shape), dtype=dtype, device=device)
        super().__init__((layer[0], layer[1]) for layer in every)
        self._device, self._token = device, (heads, dim)
        if layout == HND:
            every = every.transpose(3, 4)
        elif layout == NZ:
            every = every.permute(0, 1, 2, 4, 3, 5)
        self._all = every
        """[layers, 2, blocks, block size, ...], whatever the layout."""
        self.beside = None if device == "cpu" else CopiesBeside(device, self._gathered)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)

    def clear(self, blocks: np.ndarray) -> None:
        """Decoding reads whole blocks, and a stale NaN would survive its mask."""
        self._all[:, :, self._index(blocks)] = 0

    def read(self, blocks: np.ndarray) -> Tensor:
        return self._gathered(blocks).cpu()

    def _gathered(self, blocks: np.ndarray) -> Tensor:
        """As `read` gives them, on the device."""
        values = self._all[:, :, self._index(blocks)].permute(2, 0, 1, 3, 4, 5).contiguous()
        return values.view(*values.shape[:4], *self._token)

    def write(self, blocks: np.ndarray, values: Tensor) -> None:
        values = values.to(self._device).permute(1, 2, 0, 3, 4, 5)
        self._all[:, :, self._index(blocks)] = values.reshape(*values.shape[:4], *self._all.shape[4:])

    def copy(self, blocks: np.ndarray, copies: np.ndarray) -> None:
        self._all[:, :, self._index(copies)] = self._all[:, :, self._index(blocks)]

    def move(self, slots: np.ndarray, places: np.ndarray) -> None:
        size = self._all.shape[3]
        (block, at), (to, into) = ((self._index(n // size), self._index(n % size)) for n in (slots, places))
        self._all[:, :, to, into] = self._all[:, :, block, at]
