"""The vendors' collectives, through torch.distributed. torch's name for one does not say whose it is: `nccl` is
NVIDIA's, on a HIP build RCCL and with torch_xmlir Kunlun's BKCL. So a network is chosen by vendor.

Their collectives run on a stream of the library: `start` returns when one is queued, and `wait` makes the device's
current stream wait for it, not the host. That a rank is lost is noticed by the library's own watch, which ends the
process.
"""

from __future__ import annotations

import os
import weakref
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist
from attrs import field, frozen
from torch import Tensor

from sagellm.backends.chips import Vendor
from sagellm.backends.comm import SECONDS, Collectives, CommBackendProtocol, Gloo, Work, reason, wait
from sagellm.errors import RankLost, UserError, unknown

# newer names of the same functions; vendors' builds of torch are older
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@frozen(kw_only=True)
class Network:
    """A library of collectives."""

    name: str
    title: str
    backend: str
    """torch's name of it."""
    on_stream: bool = True
    """Whether its collectives run beside the device's own work."""
    named_by: str | None = None
    """Method of torch's process group that gives the name by which fused calls know the group; None: torch's name."""
    settings: dict[str, str] = field(factory=dict)
    """Environment variables that it reads, and what they say."""
    whole: frozenset[str] = frozenset()
    """Those of `settings` that are whole numbers."""
    source: str

    def check_settings(self) -> None:
        """That what the environment says is of the right kind: the libraries ignore or die of what they cannot read."""
        for name in sorted(self.whole):
            if name in os.environ and not os.environ[name].isdigit():
                raise UserError(
                    f"{name} is {os.environ[name]!r}; accepted: a whole number ({self.settings[name]})"
                )


NETWORKS = {
    network.name: network
    for network in (
        Network(
            name="gloo",
            title="gloo, through host memory",
            backend="gloo",
            on_stream=False,
            source="torch",
        ),
        Network(
            name="nccl",
            title="NVIDIA's NCCL",
            backend="nccl",
            settings={"NCCL_MIN_NCHANNELS": "channels at the least", "NCCL_DEBUG": "what it logs"},
            whole=frozenset({"NCCL_MIN_NCHANNELS"}),
            source="torch",
        ),
        Network(
            name="rccl",
            title="RCCL of Hygon's DTK",
            backend="nccl",
            settings={
                "NCCL_MIN_NCHANNELS": "channels at the least",
                "ALLREDUCE_STREAM_WITH_COMPUTE": "all-reduces on the stream that computes",
            },
            whole=frozenset({"NCCL_MIN_NCHANNELS"}),
            source="vllm-plugin-das",
        ),
        Network(
            name="bkcl",
            title="Kunlun's BKCL",
            backend="nccl",
            source="vllm-kunlun",
        ),
        Network(
            name="hccl",
            title="Huawei's HCCL",
            backend="hccl",
            named_by="get_hccl_comm_name",
            settings={
                "HCCL_BUFFSIZE": "MB of a communicator's buffer",
                "HCCL_CONNECT_TIMEOUT": "seconds in which the ranks must have met",
                "HCCL_EXEC_TIMEOUT": "seconds that a collective may take",
                "HCCL_OP_EXPANSION_MODE": "what runs collectives; AIV: the vector cores",
                "HCCL_DETERMINISTIC": "true: sums are made in one order",
                "HCCL_SO_PATH": "another library",
            },
            whole=frozenset({"HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"}),
            source="torch_npu 2.13.0, vllm-ascend",
        ),
        Network(
            name="cncl",
            title="Cambricon's CNCL",
            backend="cncl",
            source="Cambricon/torch_mlu r2.4_develop",
        ),
    )
}


def find(name: str) -> Network:
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    return NETWORKS[name]


def connect(vendor: Vendor, port: int, rank: int, size: int) -> CommBackendProtocol:
    """This rank's collectives on the devices of a vendor, of which it takes the one that has its number."""
    network = find(vendor.network)
    if network.name == "gloo":
        return Gloo(port, rank, size)
    for package in vendor.plugins:
        import_module(package)
    devices = getattr(torch, vendor.device)
    if rank >= (count := devices.device_count()):
        choice = f" ({' or '.join(vendor.visible)} chooses them)" if vendor.visible else ""
        raise UserError(f"tensor_parallel is {size}; accepted: at most the {count} devices there are{choice}")
    devices.set_device(rank)
    return ProcessGroup(network, vendor.device, port, rank, size)


class ProcessGroup(Collectives):
    """torch.distributed's default group of this process, on a network that it knows by name."""

    def __init__(
        self, network: Network, device: str, port: int, rank: int, size: int, seconds: float = SECONDS
    ):
        """The ranks meet at a store on this machine's `port`. Raises `UserError` and `RankLost`."""
        self.network, self.device, self.rank, self.size = network, device, rank, size
        self._leaving: list[dist.P2POp] = []
        network.check_settings()
        if not dist.is_backend_available(network.backend):
            raise UserError(
                f"network {network.name} is not in torch {torch.__version__}; accepted: a build or plug-in "
                f"that has {network.backend!r} ({network.title})"
            )
        if dist.is_initialized():
            raise UserError(
                "torch.distributed has a default group in this process; accepted: none, as with core: process"
            )
        timeout = timedelta(seconds=seconds)
        try:
            store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timeout)
            dist.init_process_group(network.backend, store=store, rank=rank, world_size=size, timeout=timeout)
        except RuntimeError as error:
            raise RankLost(f"rank {rank} cannot meet the others: {reason(error)}") from error
        self._finalizer = weakref.finalize(self, _leave)

    @property
    def group_name(self) -> str:
        """By which calls that fuse a product and a collective know the group."""
        group = dist.group.WORLD
        if self.network.named_by is None:
            return group.group_name
        return getattr(group._get_backend(torch.device(self.device)), self.network.named_by)(self.rank)

    def close(self) -> None:
        self._finalizer()

    def _all_reduce(self, x: Tensor, dim: int) -> Work:
        total = x.clone(memory_format=torch.contiguous_format)
        return Work(dist.all_reduce(total, async_op=True) if x.numel() else None, lambda: total)

    def _all_gather(self, x: Tensor, dim: int) -> Work:
        mine = x.movedim(dim, 0).contiguous()
        whole = mine.new_empty(self.size * len(mine), *mine.shape[1:])
        work = all_gather(whole, mine, async_op=True) if x.numel() else None
        return Work(work, lambda: whole.movedim(0, dim).contiguous())

    def _reduce_scatter(self, x: Tensor, dim: int) -> Work:
        whole = x.movedim(dim, 0).contiguous()
        part = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        work = reduce_scatter(part, whole, async_op=True) if x.numel() else None
        return Work(work, lambda: part.movedim(0, dim).contiguous())

    def _all_to_all(self, x: Tensor, dim: int) -> Work:
        parts = torch.stack(x.chunk(self.size, dim))
        came = torch.empty_like(parts)
        work = dist.all_to_all_single(came, parts, async_op=True) if x.numel() else None
        return Work(work, lambda: torch.cat(came.unbind(), dim))

    def send(self, x: Tensor, shift: int) -> None:
        """It leaves with the next `recv`: on a stream, a send and a receive between two ranks that are not queued as
        one wait for each other."""
        self._leaving.append(dist.P2POp(dist.isend, x.contiguous(), (self.rank + shift) % self.size))

    def recv(self, rows: int, width: int, dtype: torch.dtype, shift: int) -> Tensor:
        came = torch.empty(rows, width, dtype=dtype, device=self.device)
        both, self._leaving = (
            [*self._leaving, dist.P2POp(dist.irecv, came, (self.rank - shift) % self.size)],
            [],
        )
        for work in dist.batch_isend_irecv(both):
            wait(work)
        return came


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
