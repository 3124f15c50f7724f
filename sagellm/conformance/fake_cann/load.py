"""Import torch_npu over the fake CANN, and fill in what its kernels would have computed.

It belongs into a process of its own, as torch_npu renames torch's third device and patches torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from sagellm.backends.ascend.contract import CONTRACT
from sagellm.backends.aten.cache import DeviceCache
from sagellm.backends.contract import Call, Contract
from sagellm.conformance import operations
from sagellm.conformance.fake_cann.build import MAIN, build
from sagellm.conformance.order import HOST, Order, Span, spans
from sagellm.conformance.stand_in import ContractBroken, checked
from sagellm.engine.core import EngineCore

SOCS = {"910B": "Ascend910B3", "910C": "Ascend910_9391", "310P": "Ascend310P3", "950": "Ascend950PR_9599"}
"""The name of each chip as CANN gives it."""
HOST_SIDE = {
    "aten::_local_scalar_dense",
    "aten::_to_copy",
    "aten::_unsafe_view",
    "aten::copy_",
    "aten::resize_",
    "aten::set_",
}
"""What needs no kernel: copies between memories, views, and allocation."""
NO_RESULT = {
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_infer_output",
}
"""Calls that make room for results; a captured attention wants them."""
DATA_DEPENDENT = {"aten::nonzero"}
"""Results whose shape the kernel tells, which here computes none."""
FACTORIES = ("aten::empty", "aten::new_empty")
HOST_WAITS = ("event", "stream", "device")
"""What makes the host know more, at the beginning of a line of the order."""


def load(chip: str = "910B", devices: int = 1) -> ctypes.CDLL:
    """Import torch_npu, with so many devices of this chip; the library that holds the trace. Raises `Unavailable`."""
    wheel, libraries = build()
    os.environ |= {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TASK_QUEUE_ENABLE": "0",
        "SAGELLM_FAKE_DEVICES": str(devices),
        "SAGELLM_FAKE_SOC": SOCS[chip],
    }
    main = ctypes.CDLL(str(libraries / MAIN), ctypes.RTLD_GLOBAL)
    for library in sorted(libraries.glob("*.so")):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(wheel))
    import torch_npu  # noqa: F401

    main.sagellm_trace.restype = main.sagellm_order.restype = ctypes.c_char_p
    return main


def host(x: Any) -> Any:
    """A CPU tensor over the same bytes: the device's memory is the host's."""
    if not isinstance(x, Tensor) or x.device.type != "npu":
        return x
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(x.shape, dtype=x.dtype)
    raw = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(raw, dtype=torch.uint8).view(x.dtype).as_strided(
        x.shape, x.stride(), x.storage_offset()
    )  # fmt: skip


@define
class Seen:
    """What the vendor's host code did."""

    kernels: Counter[str] = field(factory=Counter)
    """Kernels launched, by name."""
    calls: Counter[str] = field(factory=Counter)
    """Vendor calls, by name."""
    wrong: list[str] = field(factory=list)
    """Kernels that are not those promised, results of another shape than the vendor's, and operators that the host
    code leaves to the CPU."""
    replays: int = 0
    """Captured graphs that were launched."""
    shapes: int = 0
    """Calls whose results were compared with the vendor's own shape inference."""
    order: Order = field(factory=Order)
    """Of what was asked of the device's streams."""
    device: Any = None
    """Inside, operators run on the fake device outside an engine too."""


class References(TorchDispatchMode):
    """Each operator goes through torch_npu's host code, and then its result is computed by a reference: the
    contract's for vendor calls, else torch's own CPU kernel."""

    def __init__(self, contract: Contract, library: ctypes.CDLL):
        super().__init__()
        self._contract, self._library, self.seen = contract, library, Seen(device=self)
        self._inferred: set[tuple] = set()
        self._captured: list[tuple] = []
        self._updated: dict[int, dict] = {}
        """Arguments of captured calls that can be updated, by the address of their first result."""
        self._threads: set[int] = set()
        """Those that ask for operators; others, such as the library's watch over collectives, are not the host here."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name
        call = self._contract.find(name)
        if call is None and _is_view(operator) and operator._can_decompose():
            with self:  # what is a view or a copy, such as `to` and `flatten`, as the one that it is here
                return operator.decompose(*args, **kwargs)
        self.follow()
        self._library.sagellm_trace_clear()
        out = operator(*args, **kwargs)
        asked = self._asked()
        if not any(isinstance(x, Tensor) and x.device.type == "npu" for x in _leaves((args, kwargs, out))):
            self._order(asked, None if _is_view(operator) else HOST, operator, args, kwargs, out)
            return out
        launched = [line.partition(" ")[0] for line in self._library.sagellm_trace().decode().splitlines()]
        self.seen.kernels.update(launched)
        if (call is None and _is_view(operator)) or name in NO_RESULT or operator.namespace == "c10d":
            self._order(asked)
            return out
        self._check(name, call, launched, out)
        if self._library.sagellm_updating():
            self._order(asked)
            self._updated[kwargs["out"][0].data_ptr()].update(kwargs)
        elif self._library.sagellm_capturing():
            self._order(asked)
            self._record(operator, call, args, dict(kwargs), out)
        else:
            self._order(asked, _stream(), operator, args, kwargs, out)
            return self._compute(operator, call, args, kwargs, out)
        return out

    def _asked(self) -> list[str]:
        """What the device's streams were asked for since this was asked last."""
        lines = self._library.sagellm_order().decode().splitlines()
        self._library.sagellm_order_clear()
        self._threads.add(threading.get_native_id())
        parts = (line.partition(" ") for line in lines)
        return [
            said for thread, _, said in parts
            if int(thread) in self._threads or not said.startswith(HOST_WAITS)
        ]  # fmt: skip

    def follow(self) -> None:
        """Take note of what was asked outside operators."""
        self._order(self._asked())

    def _order(
        self, asked: list[str], stream: int | None = None, operator=None, args=(), kwargs=None, out=None
    ):
        """Note an operator's own accesses on its stream: behind what its allocations asked, before all else."""
        first = next((i for i, said in enumerate(asked) if not said.startswith("event")), len(asked))
        for said in asked[:first]:
            self.seen.order.note(said)
        if stream is not None:
            self.seen.order.access(
                stream, operator.name(), *_touched(operator, args, kwargs, out, stream == HOST)
            )
        for said in asked[first:]:
            self.seen.order.note(said)

    def _compute(self, operator, call: Call | None, args, kwargs, out):
        """Fill the results in; gives them."""

        def plain(x):
            return torch.device("cpu") if isinstance(x, torch.device) else host(x)

        some, named = _each(plain, (args, kwargs))
        if call is not None:
            self.seen.calls[call.name] += 1
            given = {k: v for k, v in named.items() if k not in ("workspace", "out")}
            result = checked(call, some, given)
            if "out" not in named:
                self._check_shapes(operator, call, args, kwargs, result)
        else:
            result = operator(*some, **named)
        if operator._schema.name in DATA_DEPENDENT:
            return torch.empty(result.shape, dtype=result.dtype, device="npu").copy_(result)
        for device, value in zip(_leaves(out), _leaves(result)):
            if isinstance(device, Tensor) and isinstance(value, Tensor) and value.numel():
                if device.shape != value.shape or device.dtype != value.dtype:
                    reason = f"{_shape(device)} of the host code, {_shape(value)} of the reference"
                    raise ContractBroken("shape", operator.name(), reason)
                host(device).copy_(value)
        return out

    def _record(self, operator, call: Call | None, args, kwargs, out) -> None:
        """Nothing is computed while a graph is captured; results are not numbers until it is replayed."""
        for x in _leaves(out):
            if isinstance(x, Tensor) and x.numel() and x.is_floating_point() and call is not None:
                host(x).fill_(float("nan"))
        self._captured.append((operator, call, args, kwargs, out))
        if "out" in kwargs:
            self._updated[kwargs["out"][0].data_ptr()] = kwargs

    def captured(self) -> list[tuple]:
        """What was recorded since it was asked last."""
        some, self._captured = self._captured, []
        return some

    def replay(self, recorded: list[tuple]) -> None:
        """Compute it all again."""
        self.seen.replays += 1
        self.follow()
        with _disable_current_modes():  # the references' own operators are nobody's
            for operator, call, args, kwargs, out in recorded:
                self._order([], _stream(), operator, args, kwargs, out)
                self._compute(operator, call, args, kwargs, out)

    def _check(self, name: str, call: Call | None, launched: list[str], out) -> None:
        if call is not None:
            # ATB makes an operation once and keeps it.
            made = [k for k in call.kernels if k.startswith("atb::") and self.seen.kernels[k]]
            if not made and not set(call.kernels) & set(launched):
                self._wrong(f"{name} launched {launched}; promised: {' or '.join(call.kernels)}")
        elif not launched and not (name in HOST_SIDE or name.startswith(FACTORIES)):
            some = [x for x in _leaves(out) if isinstance(x, Tensor)]
            if any(x.numel() for x in some):
                self._wrong(f"{name} launched no kernel: it would run on the CPU")

    def _check_shapes(self, operator, call: Call, args, kwargs, result) -> None:
        """The vendor's own shape inference, once for every form of a call."""
        form = call.name, str(_each(_shape, (args, kwargs)))
        if form in self._inferred or not torch._C._dispatch_has_kernel_for_dispatch_key(
            operator.name(), "Meta"
        ):
            return
        self._inferred.add(form)

        def meta(x):
            return (
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
                if isinstance(x, Tensor)
                else x
            )

        some, named = _each(meta, (args, kwargs))
        theirs, ours = (
            [_shape(x) for x in _leaves(out) if isinstance(x, Tensor)]
            for out in (operator(*some, **named), result)
        )
        self.seen.shapes += 1
        used = [i for i, x in enumerate(_leaves(result)) if isinstance(x, Tensor) and x.numel()]
        if any(theirs[i] != ours[i] for i in used):  # what is not asked for has any shape
            self._wrong(
                f"{call.name} gives {theirs} by the vendor's shape inference, {ours} by the reference"
            )

    def _wrong(self, said: str) -> None:
        if said not in self.seen.wrong:
            self.seen.wrong.append(said)


def _leaves(x: Any) -> Iterator[Any]:
    """What lies in lists, tuples and tables. As torch's pytree, which took a quarter of a run's time."""
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from _leaves(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from _leaves(y)
    else:
        yield x


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """The same lists, tuples and tables of what the function makes of each."""
    if isinstance(x, (list, tuple)):
        made = [_each(function, y) for y in x]
        return made if isinstance(x, list) else tuple(made)
    if isinstance(x, dict):
        return {key: _each(function, y) for key, y in x.items()}
    return function(x)


@cache
def _is_view(operator) -> bool:
    returns = operator._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _stream() -> int:
    return torch.npu.current_stream().npu_stream


def _touched(operator, args, kwargs, out, on_host: bool) -> tuple[list[Span], list[Span]]:
    """The memory that an operator reads and writes, of the host's or the device's."""
    schema = operator._schema.arguments
    given = [(schema[i], value) for i, value in enumerate(args)]
    given += [(argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs]
    part = PARTS.get(operator._schema.name, lambda values: {})({a.name: value for a, value in given})
    reads: list[Span] = []
    writes: list[Span] = []
    for argument, value in [*given, (None, out)]:
        written = argument is None or (argument.alias_info is not None and argument.alias_info.is_write)
        if argument is None and any(r.alias_info is not None for r in operator._schema.returns):
            continue  # it is one of the arguments
        for x in _leaves(value):
            if isinstance(x, Tensor) and (x.device.type == "npu") != on_host:
                name = "" if argument is None else argument.name
                (writes if written else reads).extend(spans(x, *part.get(name, ())))
    return reads, writes


def _indexed(values: dict) -> dict:
    """`self` at rows of the first dimension that is indexed."""
    at = next(i for i, index in enumerate(values["indices"]) if index is not None)
    index = host(values["indices"][at])
    return {"self": (at, _flat(index))} if index.dtype == torch.int64 else {}


def _selected(values: dict) -> dict:
    return {"self": (values["dim"], _flat(values["index"]))}


def _written_blocks(values: dict) -> dict:
    """Blocks of a cache [blocks, block size, ...], or NZ, whose slots are written."""
    found = {}
    slots = host(values.get("slot_mapping", values.get("slot_indices")))
    for name in ("key_cache", "value_cache"):
        cache = values[name]
        size = cache.shape[2] if "slot_indices" in values else cache.shape[1]
        found[name] = 0, _flat(slots // size)
    return found


def _flat(index: Tensor) -> list[int]:
    return host(index).reshape(-1).tolist()


PARTS = {
    "aten::index": _indexed,
    "aten::index_put_": _indexed,
    "aten::_index_put_impl_": _indexed,
    "aten::index_select": _selected,
    "aten::index_copy_": _selected,
    "npu::npu_scatter_pa_kv_cache": _written_blocks,
    "atb::_npu_reshape_and_cache": _written_blocks,
}
"""Operators that touch a part of an argument, by its name: its dimension and the rows there."""


def _shape(x: Any) -> Any:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else x


@contextmanager
def fake_ascend(chip: str = "910B", devices: int = 1) -> Iterator[Seen]:
    """Engines for `ascend` made inside run on the fake device, in whatever thread; what the host code did.

    Raises `Unavailable`. torch_npu stays loaded afterwards.
    """
    references = References(CONTRACT, load(chip, devices))

    def on_device(method):
        def inside(*args, **kwargs):
            with nullcontext() if references in _get_current_dispatch_mode_stack() else references:
                return method(*args, **kwargs)

        return inside

    def capture_end(graph):
        before[torch.npu.NPUGraph, "capture_end"](graph)
        graph.recorded = references.captured()

    def replay(graph):
        before[torch.npu.NPUGraph, "replay"](graph)
        if not graph.auto_dispatch_capture:
            references.replay(graph.recorded)

    def update(graph, cpu_update_input):
        """The graph waits for this before its attention."""
        before[torch.npu.NPUGraph, "update"](graph, cpu_update_input)
        references.replay(graph.recorded)

    core = [(EngineCore, "__init__"), (EngineCore, "advance"), (DeviceCache, "read"), (DeviceCache, "write")]
    core.append((operations, "compute"))
    graphs = {"capture_end": capture_end, "replay": replay, "update": update}
    before = {(owner, name): getattr(owner, name) for owner, name in core}
    before |= {(torch.npu.NPUGraph, name): getattr(torch.npu.NPUGraph, name) for name in graphs}
    try:
        for owner, name in core:
            setattr(owner, name, on_device(before[owner, name]))
        for name, method in graphs.items():
            setattr(torch.npu.NPUGraph, name, method)
        yield references.seen
    finally:
        for (owner, name), method in before.items():
            setattr(owner, name, method)
