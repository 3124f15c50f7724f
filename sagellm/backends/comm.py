"""Collectives between ranks: what emitted code asks of them, and gloo's, through host memory. Vendors': `networks.py`.

x is a tensor of this rank. All ranks call the same collectives in the same order, with tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sagellm.errors import RankLost

SECONDS = 120.0
"""A collective that takes longer means that a rank does not come to it."""


class Pending(Protocol):
    """A collective that is under way."""

    def wait(self) -> Tensor: ...


class CommBackendProtocol(Protocol):
    """Raises `RankLost` where a rank is gone. No collective changes x."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors joined along `dim`."""
        ...

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of the sum."""
        ...

    def all_to_all(self, x: Tensor, dim: int) -> Tensor:
        """Everybody's part for this rank along `dim`, joined."""
        ...

    def start(self, collective: str, x: Tensor, dim: int = 0) -> Pending:
        """Begin one of the four above, by name."""
        ...

    def send(self, x: Tensor, shift: int) -> None:
        """To rank + shift, around the end; does not wait for it to come there."""

    def recv(self, rows: int, width: int, dtype: torch.dtype, shift: int) -> Tensor:
        """[rows, width] from rank - shift, around the end."""
        ...

    def close(self) -> None:
        """Leave the others: this process may then meet some anew."""


class Work:
    """A collective of torch, and what is made of its buffers in the end."""

    def __init__(self, work: dist.Work | None, finish: Callable[[], Tensor]):
        self._work, self._finish = work, finish

    def wait(self) -> Tensor:
        if self._work is not None:
            wait(self._work)
        return self._finish()


def wait(work: dist.Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise RankLost(f"a collective failed: {reason(error)}") from error


def reason(error: RuntimeError) -> str:
    """What torch says first; advice follows."""
    return str(error).splitlines()[0].partition(". ")[0]


class Collectives:
    """The four that combine tensors, each begun by the method of a subclass that has its name behind a `_`."""

    def start(self, collective: str, x: Tensor, dim: int = 0) -> Work:
        begin = getattr(self, f"_{collective}")
        try:
            return begin(x, dim)
        except RuntimeError as error:
            raise RankLost(f"{collective} cannot begin: {reason(error)}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.start("all_reduce", x).wait()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.start("all_gather", x, dim).wait()

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.start("reduce_scatter", x, dim).wait()

    def all_to_all(self, x: Tensor, dim: int) -> Tensor:
        return self.start("all_to_all", x, dim).wait()


class Gloo(Collectives):
    """gloo over the loopback interface, in a process group of its own: others in the process are left alone."""

    def __init__(self, port: int, rank: int, size: int, seconds: float = SECONDS):
        self.rank, self.size = rank, size
        self._sending: list[tuple[dist.Work, Tensor]] = []
        timeout = timedelta(seconds=seconds)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        try:
            store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timeout)
            self._gloo = dist.ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise RankLost(f"rank {rank} cannot meet the others: {reason(error)}") from error

    def _all_reduce(self, x: Tensor, dim: int) -> Work:
        total = x.clone(memory_format=torch.contiguous_format)
        return Work(self._gloo.allreduce([total]) if x.numel() else None, lambda: total)

    def _all_gather(self, x: Tensor, dim: int) -> Work:
        mine = x.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        work = self._gloo.allgather([parts], [mine]) if x.numel() else None
        return Work(work, lambda: torch.cat(parts, dim))

    def _reduce_scatter(self, x: Tensor, dim: int) -> Work:
        parts = [part.contiguous() for part in x.chunk(self.size, dim)]
        total = torch.empty_like(parts[self.rank])
        return Work(self._gloo.reduce_scatter([total], [parts]) if x.numel() else None, lambda: total)

    def _all_to_all(self, x: Tensor, dim: int) -> Work:
        parts = torch.stack(x.chunk(self.size, dim))
        came = torch.empty_like(parts)
        work = self._gloo.alltoall_base(came, parts, [], []) if x.numel() else None
        return Work(work, lambda: torch.cat(came.unbind(), dim))

    def close(self) -> None:
        """Nothing: its group is no other's, and ends with it."""

    def send(self, x: Tensor, shift: int) -> None:
        x = x.contiguous()
        self._sending.append((self._gloo.send([x], (self.rank + shift) % self.size, 0), x))

    def recv(self, rows: int, width: int, dtype: torch.dtype, shift: int) -> Tensor:
        came = torch.empty(rows, width, dtype=dtype)
        wait(self._gloo.recv([came], (self.rank - shift) % self.size, 0))
        while self._sending:
            wait(self._sending.pop()[0])
        return came


def open_store(ranks: int) -> dist.TCPStore:
    """Where the ranks meet, on a free port of the loopback interface; it must outlive them."""
    return dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
