"""The contract of a backend: what it can do, what it emits, and how its columns and cache look on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sagellm.backends import chips, devices, networks
from sagellm.backends.chips import Chip, Vendor
from sagellm.backends.comm import CommBackendProtocol, Gloo
from sagellm.backends.contract import Contract
from sagellm.backends.plan import Program
from sagellm.errors import UserError
from sagellm.ir.graph import IRGraph
from sagellm.rows import Rows
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor, CostModel
from sagellm.topology import TOPOLOGIES, Topology


class Beside(Protocol):
    """Copies of KV blocks that a device makes while it computes."""

    def begin_step(self) -> None:
        """What is asked of the device from now on comes after the last step's copies, and this step's copies come
        after what was asked before."""

    def copy(self, blocks: np.ndarray, room: Tensor, slots: np.ndarray) -> None:
        """Begin to copy these blocks, each as `KVCache.read` gives it, to these slots of pinned host memory."""

    def wait(self) -> None:
        """Until the copies are made, and their memory on the host may be touched."""


class KVCache(Protocol):
    """What the emitted code and the executor ask of a cache."""

    beside: Beside | None
    """None: it makes no copies beside what is computed."""

    def __getitem__(self, layers): ...

    def clear(self, blocks: np.ndarray) -> None:
        """Forget what these blocks held, as they go to another sequence."""

    def read(self, blocks: np.ndarray) -> Tensor:
        """Keys and values of these blocks in host memory: [blocks, layers, 2, block_size, heads, head_dim].

        In int8 the last dimension is bytes: head_dim numbers, and their float32 scale.
        """
        ...

    def write(self, blocks: np.ndarray, values: Tensor) -> None:
        """Put such keys and values into these blocks."""

    def copy(self, blocks: np.ndarray, copies: np.ndarray) -> None:
        """Make each copy hold what its block holds."""

    def move(self, slots: np.ndarray, places: np.ndarray) -> None:
        """Keys and values at these slots (block * block_size + offset) to those places; read before any is written."""


class Backend(ABC):
    """One vendor. Made without touching the device; `capability` may probe it, lazily."""

    name: str
    chip: str | None = None
    """The chip, or family of chips, that programs are for; None: it does not matter."""
    vendor_kernels = False
    """Whether the vendor's kernels were chosen where they are not the default."""

    @property
    def vendor(self) -> Vendor | None:
        """Whose devices it is for, and how they are found; None: it needs none of its own."""
        return chips.vendor(self.name) if self.name in chips.NAMES else None

    @property
    def target(self) -> str:
        """The name by which it is loaded again."""
        chip = "" if self.chip is None else f":{self.chip}"
        return f"{self.name}{chip}{'+kernels' if self.vendor_kernels else ''}"

    @property
    def available(self) -> bool:
        """Whether its device is on this machine."""
        return self.vendor is None or devices.probe(self.vendor).found

    @property
    def chip_here(self) -> str | None:
        """What `chip` would be for this machine's device; None: it does not matter, or is not known."""
        found = (
            devices.probe(self.vendor).devices if self.vendor is not None and self.chip is not None else ()
        )
        return found[0].chip.kind if found and found[0].chip else None

    @property
    def silicon(self) -> Chip | None:
        """What is known of `chip`; None: nothing."""
        return None if self.vendor is None or self.chip is None else self.vendor.chip(self.chip)

    @property
    def free_memory(self) -> int | None:
        """Bytes free on one of its devices, or, where none is here, what its chip has; None: the host's are its."""
        if self.vendor is None or self.capability.device == "cpu":
            return None
        if (free := devices.free_memory(self.vendor)) is not None:
            return free
        chip = self.silicon
        return None if chip is None or chip.memory is None else int(chip.memory.figure().value)

    @property
    @abstractmethod
    def capability(self) -> CapabilityDescriptor:
        """What the backend can do here."""

    @property
    def costs(self) -> CostModel:
        """What work takes on its device: by its chip's published peaks, where they are known."""
        chip = self.silicon
        return (None if chip is None else chip.costs()) or CostModel()

    @property
    def topology(self) -> Topology:
        """How the devices of several ranks are joined."""
        return TOPOLOGIES["gloo" if self.vendor is None else self.vendor.topology]

    def put(self, array: np.ndarray) -> Tensor:
        """These values on its device; on the CPU the tensor may share memory with the array."""
        return torch.from_numpy(array)

    @property
    def contract(self) -> Contract | None:
        """What the vendor's calls want and mean; None where the emitted code makes none."""
        return None

    @abstractmethod
    def emit(self, graph: IRGraph, name: str) -> Program:
        """Model graph, sampler and weights program as Python source."""

    def captured(self, function: Callable, kinds: tuple[str, ...]) -> Callable:
        """A function of the model for rows of these kinds, so that it is launched as a whole where the device can."""
        return function

    @abstractmethod
    def make_cache(self, schema: KVCacheSchema, blocks: int) -> KVCache:
        """The KV cache of each layer, in the layout of this backend's kernels. Block 0 is padding."""

    def make_comm(self, port: int, rank: int, ranks: int) -> CommBackendProtocol:
        """This rank's collectives with the others, which meet at a store on this machine's `port`."""
        if self.vendor is None or self.capability.device == "cpu":
            return Gloo(port, rank, ranks)
        return networks.connect(self.vendor, port, rank, ranks)

    @abstractmethod
    def upload(self, rows: Rows, block_size: int) -> Any:
        """The step's columns as the emitted code reads them."""


def require_device(backend: Backend) -> None:
    """That a device which runs its programs is on this machine.

    Raises `UserError`, one line: what is missing and the command that installs it, or which chip is here instead.
    """
    if backend.vendor is None or backend.capability.device == "cpu":
        return
    probe = devices.probe(backend.vendor)
    if not probe.found:
        raise probe.refusal()
    chip, wanted = probe.devices[0].chip, backend.silicon
    if chip is not None and wanted is not None and chip.kind != wanted.kind:
        raise UserError(
            f"device {backend.name!r} is {probe.devices[0].name} here, and the target {wanted}; "
            f"accepted: {backend.name}:{chip.kind}"
        )
