"""Kernels in stock torch: which call each operation becomes. A vendor's table starts from this one."""

from __future__ import annotations

from collections.abc import Callable

from xdsl.ir import Operation

from sagellm.backends.emit import COLLECTIVES, Emitter, Line, literal, read_tensor, torch_dtype
from sagellm.ir.attrs import TensorType, dtype_name, last_dim
from sagellm.ir.storage import overwritable

IMPORTS = """\
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from sagellm.backends import sampling
from sagellm.backends.aten import kernels as aten
from sagellm.models.rope import RopeConfig, cos_sin_table, dynamic_cos_sin"""

FLOATS = ("bfloat16", "float16", "float32")

Module = Callable[[Operation], str]
"""The module whose kernel an operation calls, by its name in the emitted text."""


def cache(op: Operation) -> str:
    """The layer's keys and values as its kernels read and write them."""
    return (
        "kv"
        if op.properties.get("kv_dtype") is None
        else f"aten.int8(kv, {torch_dtype(op.operands[0].type)})"
    )


def heads(e: Emitter, value, head_dim: int) -> str:
    """[T, heads * head_dim] as [T, heads, head_dim]."""
    return f"{e.name(value)}.view(-1, {last_dim(value.type) // head_dim}, {head_dim})"


def cached(e: Emitter, op: Operation) -> tuple[str, str]:
    """Keys and values [slots, heads, D] that `nn.kv_write` writes, contiguous; a shared token for each of its slots."""
    k, v, rows = op.operands
    shared = "shared" in rows.type.data
    end = f".index_select(0, {e.name(rows)}.sources)" if shared else ".contiguous()"
    keys, values = (heads(e, x, e.value(op, "head_dim")) + end for x in (k, v))
    return keys, values


def activations(op: Operation) -> str:
    """The type of the first float tensor of the operation's function."""
    block = op.parent
    assert block is not None
    for value in (*block.args, *(result for other in block.ops for result in other.results)):
        if isinstance(value.type, TensorType) and dtype_name(value.type) in FLOATS:
            return torch_dtype(value.type)
    return torch_dtype(op.results[0].type)


def owned(e: Emitter, op: Operation, index: int, dense: bool = False) -> str:
    """An operand that the call may write over: a copy where its old value is still read; `dense`: contiguous."""
    value = op.operands[index]
    if not overwritable(value, op):
        return f"{e.name(value)}.clone(memory_format=torch.contiguous_format)"
    return e.name(value) + (".contiguous()" if dense else "")


def linear(e: Emitter, op: Operation) -> str:
    x, weight, bias = e.name(op.operands[0]), e.weight(op), e.weight(op, "bias")
    return f"F.linear({x}, {weight}{'' if bias == 'None' else ', ' + bias})"


def embedding(e: Emitter, op: Operation) -> str:
    rows, table = e.name(op.operands[0]), e.weight(op)
    if e.value(op, "group") is None:
        return f"F.embedding({rows}.tokens, {table})"
    return f"aten.embedding_part({rows}.tokens, {table}, comm.rank)"


def split(e: Emitter, op: Operation) -> str:
    sizes = [size.value.data for size in op.properties["sizes"].data]
    return f"{e.name(op.operands[0])}.split({sizes}, -1)"


def rope_dynamic(e: Emitter, op: Operation) -> str:
    rope = (
        f'RopeConfig(kind="dynamic", rotary_dim={last_dim(op.results[0].type)}, '
        f"theta={literal(e.value(op, 'theta'))}, factor={literal(e.value(op, 'factor'))}, "
        f"original_max_positions={e.value(op, 'original')})"
    )
    rows = e.name(op.operands[0])
    return f"dynamic_cos_sin({rope}, {rows}.positions, {rows}.lengths)"


def rope_table(e: Emitter, op: Operation) -> str:
    given = {name: attr.value.data for name, attr in op.properties["parameters"].data.items()}
    arguments = ", ".join(f"{name}={literal(value)}" for name, value in given.items())
    rows = op.results[0].type.get_shape()[0]
    return f'cos_sin_table(RopeConfig(kind="{e.value(op, "kind")}", {arguments}), {rows})'


def template(text: str, module: Module = lambda op: "aten") -> Line:
    """Text over the operands' names `{0}`, `{1}`, the weight `{w}` and the module of fused kernels `{m}`."""

    def line(e: Emitter, op: Operation) -> str:
        return text.format(*map(e.name, op.operands), w=e.weight(op), m=module(op) if "{m}" in text else "")

    return line


def attention(
    e: Emitter, op: Operation, module: Module, kv: str | None = None, rows: str | None = None
) -> str:
    """By the kinds of rows: each kind has a kernel of its own."""
    words, window = op.operands[1].type.data, e.value(op, "window")
    q, scale = e.name(op.operands[0]), literal(e.value(op, "scale"))
    arguments = f"{q}, {kv or cache(op)}, {rows or e.name(op.operands[1])}, {scale}"
    if window is not None:
        arguments += f", window={window}"
    if "tree" in words:
        return f"{module(op)}.tree_attention({arguments})"
    if "decode" not in words:
        return f"aten.prefill_attention({arguments})"
    # Behind a window rows see different parts of what they share.
    kernel = f"{module(op)}.{'cascade' if 'cascade' in words and window is None else 'decode'}_attention"
    return f"aten.mixed_attention({kernel}, {arguments})" if "prefill" in words else f"{kernel}({arguments})"


def table(module: Module) -> dict[str, Line]:
    """The kernel table; kernels that others than stock torch may have are taken from the module given."""

    def rms_norm(e: Emitter, op: Operation) -> str:
        kernel = "rms_norm" if e.value(op, "heads") is None else "head_norm"
        return (
            f"{module(op)}.{kernel}({e.name(op.operands[0])}, {e.weight(op)}, {literal(e.value(op, 'eps'))})"
        )

    def add_rms_norm(e: Emitter, op: Operation) -> str:
        eps = literal(e.value(op, "eps"))
        return f"{module(op)}.add_rms_norm({e.names_of(op.operands)}, {e.weight(op)}, {eps})"

    def norm_quantize(e: Emitter, op: Operation) -> str:
        name, eps = op.name.removeprefix("nn."), literal(e.value(op, "eps"))
        norm = f"{module(op)}.{name.removesuffix('_quantize')}"
        return f"aten.{name}({norm}, {e.names_of(op.operands)}, {e.weight(op)}, {eps})"

    def rope_kv_write(e: Emitter, op: Operation) -> str:
        norms = ""
        if "eps" in op.properties:
            norms = f", ({e.weight(op, 'q_norm')}, {e.weight(op, 'k_norm')}, {literal(e.value(op, 'eps'))})"
        arguments = f"{e.names_of(op.operands)}, {e.value(op, 'head_dim')}{norms}"
        return f"{module(op)}.rope_kv_write({cache(op)}, {arguments})"

    def call(text: str) -> Line:
        return template(text, module)

    return {
        "nn.embedding": embedding,
        "nn.linear": linear,
        "nn.split": split,
        "nn.split_rows": call("aten.split_rows({0})"),
        "nn.join_rows": call("torch.cat([{0}, {1}])"),
        "nn.rms_norm": rms_norm,
        "nn.add": call("{0} + {1}"),
        "nn.add_rms_norm": add_rms_norm,
        "nn.quantize": call("aten.quantize({0})"),
        "nn.rms_norm_quantize": norm_quantize,
        "nn.add_rms_norm_quantize": norm_quantize,
        "nn.silu": call("F.silu({0})"),
        "nn.mul": call("{0} * {1}"),
        "nn.silu_mul": call("{m}.silu_mul({0})"),
        "nn.cast": lambda e, op: f"{e.name(op.operands[0])}.to({torch_dtype(op.results[0].type)})",
        "nn.rope_gather": call("{w}.index_select(0, {0}.positions)"),
        "nn.rope_dynamic": rope_dynamic,
        "nn.rope": lambda e, op: f"{module(op)}.rope({e.names_of(op.operands)}, {e.value(op, 'head_dim')})",
        "nn.kv_write": lambda e, op: f"{module(op)}.kv_write({cache(op)}, {e.names_of(op.operands)})",
        "nn.rope_kv_write": rope_kv_write,
        "nn.attention": lambda e, op: attention(e, op, module),
        "nn.select_outputs": call("{0}.index_select(0, {1}.outputs)"),
        "nn.pool": lambda e, op: f'aten.pool({e.names_of(op.operands)}, "{e.value(op, "kind")}")',
        "nn.allow": call("sampling.allow({0}, {1}.grammar_rows, {1}.allowed)"),
        "nn.argmax": call("{0}.argmax(-1)"),
        "nn.bias": call("sampling.bias({0}, {1}.bias_rows, {1}.bias_tokens, {1}.bias)"),
        "nn.penalize": call(
            "sampling.penalize({0}, {1}.tokens, {1}.prompt, {1}.length, {1}.repetition, {1}.presence, {1}.frequency)"
        ),
        "nn.temperature": call("sampling.temperature_scale({0}, {1}.temperature)"),
        "nn.top_k": call("sampling.top_k({0}, {1}.top_k)"),
        "nn.top_p": call("sampling.top_p({0}, {1}.top_p)"),
        "nn.min_p": call("sampling.min_p({0}, {1}.min_p)"),
        "nn.draw": call("sampling.draw({0}, {1}.uniform, {1}.greedy)"),
    } | COLLECTIVES


STOCK = table(lambda op: "aten")
"""What every operation is in stock torch; a vendor's table names those that are not."""
JOINED = {"nn.rope_kv_write", "nn.rms_norm_quantize", "nn.add_rms_norm_quantize"}
PARTS = {name: line for name, line in STOCK.items() if name not in JOINED}
"""The same without operations that join what a vendor has kernels for."""

LOADS: dict[str, Line] = {
    "weights.tensor": lambda e, op: read_tensor(op),
    "weights.concat": lambda e, op: f"torch.cat([{e.names_of(op.operands)}])",
    "weights.rope_table": rope_table,
}

DEVICE_LOADS: dict[str, Line] = LOADS | {
    "weights.rope_table": lambda e, op: f"{rope_table(e, op)}.to(DEVICE)",
}
"""Where the header says which `DEVICE` is meant; tensors of a checkpoint are read to it."""
