"""One decoder builder for every family: model graph, sampler and weights program from a `ModelConfig`.

A layer's body is rotated: it takes the residual stream `x` and its norm `h`, and ends with the residual add and the
*next* norm, so that a fusion sees both together. Equal neighbouring layers are one function, called by `nn.repeat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from attrs import frozen
from xdsl.dialects.builtin import DictionaryAttr
from xdsl.ir import Attribute, SSAValue

from sagellm.ir.attrs import rows_type, sampling_type, tensor
from sagellm.ir.build import Body, attribute, load_program
from sagellm.ir.dialects import nn, weights
from sagellm.ir.graph import IRGraph
from sagellm.models.config import ModelConfig

ROPE_PARAMETERS = ("theta", "rotary_dim", "original_max_positions")
MORE_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
"""Fields of `RopeConfig` that a kind of rope table depends on."""

WARPS = (("draw", nn.Temperature), ("top_k", nn.TopK), ("top_p", nn.TopP), ("min_p", nn.MinP))
"""Sampling stages and their operation, in transformers' order; penalties come before, the draw after."""


@frozen
class Segment:
    """Neighbouring layers that are equal."""

    name: str
    first: int
    count: int
    window: int | None


def segments(config: ModelConfig) -> list[Segment]:
    runs, at = [], 0
    for window, run in groupby(config.windows):
        count = len(list(run))
        kind = "dense" if window is None else "window"
        earlier = sum(r.name.startswith(f"layers.{kind}") for r in runs)
        runs.append(Segment(f"layers.{kind}{f'.{earlier}' if earlier else ''}", at, count, window))
        at += count
    return runs


def build_model(
    config: ModelConfig, dtype: str, rows: tuple[str, ...], kv_dtype: str | None = None
) -> IRGraph:
    """`@model` and the functions it calls, for rows of these kinds, with the weights program.

    dtype is the type of weights and activations, and kv_dtype, where it is given, a small one of keys and values in the
    cache; logits are float32.
    """
    builder = _Builder(config, dtype, rows_type(*rows), kv_dtype)
    graph = IRGraph()
    for op in builder.build():
        graph.add(op)
    return graph


def build_embedder(
    config: ModelConfig, dtype: str, rows: tuple[str, ...], pooling: str, kv_dtype: str | None = None
) -> IRGraph:
    """`@embed_<pooling>` and the functions it calls: the model without its head, and a vector for each sequence."""
    builder = _Builder(config, dtype, rows_type(*rows), kv_dtype, pooling)
    graph = IRGraph()
    for op in builder.build():
        graph.add(op)
    return graph


def build_sampler(vocab_size: int, stages: tuple[str, ...]) -> IRGraph:
    """`@sample`: logits [R, V] to tokens [R], with the stages that some row of the batch needs."""
    logits = tensor("float32", None, vocab_size)
    chosen = tensor("int64", None)
    body = Body({"logits": logits, "how": sampling_type(*stages)})
    value, how = body.arguments()
    if "grammar" in stages:
        value = body(nn.Allow, [value, how], logits)
    if "bias" in stages:
        value = body(nn.Bias, [value, how], logits)
    if "penalties" in stages:
        value = body(nn.Penalize, [value, how], logits)
    for stage, warp in WARPS:
        if stage in stages:
            value = body(warp, [value, how], logits)
    if "draw" in stages:
        tokens = body(nn.Draw, [value, how], chosen)
    else:
        tokens = body(nn.Argmax, [value], chosen)
    graph = IRGraph()
    graph.add(body.function("sample", [tokens]))
    return graph


class _Builder:
    def __init__(
        self, config: ModelConfig, dtype: str, rows: Attribute, kv_dtype: str | None, pooling: str = ""
    ):
        self.c, self.dtype, self.rows, self.kv_dtype, self.pooling = config, dtype, rows, kv_dtype, pooling
        self.hidden = self.type(config.hidden_size)
        self.angles = tensor("float32", None, config.head_dim)

    def type(self, size: int) -> Attribute:
        return tensor(self.dtype, None, size)

    def build(self) -> Iterator:
        runs = segments(self.c)
        yield self.model(runs)
        yield self.embed()
        for run in runs:
            yield self.layer(run)
        if not self.pooling:
            yield self.head()
        yield self.load_embed()
        for run in runs:
            yield self.load_layer(run)
        if not self.pooling:
            yield self.load_head()

    def model(self, runs: list[Segment]) -> nn.Func:
        body = Body({"rows": self.rows})
        (rows,) = body.arguments()
        x, h, angles = body(nn.Call, [rows], self.hidden, self.hidden, self.angles, callee="embed")
        _name(x=x, h=h, angles=angles)
        for run in runs:
            x, h = body(
                nn.Repeat,
                [x, h, angles, rows],
                self.hidden,
                self.hidden,
                callee=run.name,
                first=run.first,
                count=run.count,
            )
            _name(x=x, h=h)
        if self.pooling:
            pooled = tensor("float32", None, self.c.hidden_size)
            vectors = body(nn.Pool, [h, rows], pooled, kind=self.pooling)
            return body.function(f"embed_{self.pooling}", [vectors])
        logits = body(nn.Call, [h, rows], tensor("float32", None, self.c.vocab_size), callee="head")
        _name(logits=logits)
        return body.function("model", [logits])

    def embed(self) -> nn.Func:
        c = self.c
        body = Body({"rows": self.rows})
        (rows,) = body.arguments()
        x = body(nn.Embedding, [rows], self.hidden, weight="embed_tokens")
        h = body(nn.RmsNorm, [x], self.hidden, weight="first_norm", eps=c.rms_norm_eps)
        if c.rope.kind == "dynamic":
            angles = body(
                nn.RopeDynamic,
                [rows],
                self.angles,
                theta=float(c.rope.theta),
                factor=float(c.rope.factor),
                original=c.rope.original_max_positions,
            )
        else:
            angles = body(nn.RopeGather, [rows], self.angles, weight="rope_table")
        return body.function("embed", [x, h, angles])

    def layer(self, run: Segment) -> nn.Func:
        c = self.c
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        body = Body({"x": self.hidden, "h": self.hidden, "angles": self.angles, "rows": self.rows})
        x, h, angles, rows = body.arguments()

        def linear(value: SSAValue, name: str, size: int, bias: bool) -> SSAValue:
            bias_name = name.removesuffix("_proj") + "_bias" if bias else None
            return body(nn.Linear, [value], self.type(size), weight=name, bias=bias_name)

        q = linear(h, "q_proj", q_size, c.qkv_bias)
        k = linear(h, "k_proj", kv_size, c.qkv_bias)
        v = linear(h, "v_proj", kv_size, c.qkv_bias)
        if c.qk_norm:
            q = body(nn.RmsNorm, [q], q.type, weight="q_norm", eps=c.rms_norm_eps, heads=c.num_heads)
            k = body(nn.RmsNorm, [k], k.type, weight="k_norm", eps=c.rms_norm_eps, heads=c.num_kv_heads)
            _name(q=q, k=k)
        q, k = body(nn.Rope, [q, k, angles], q.type, k.type, head_dim=c.head_dim)
        body(nn.KvWrite, [k, v, rows], head_dim=c.head_dim, kv_dtype=self.kv_dtype)
        a = body(
            nn.Attention,
            [q, rows],
            q.type,
            head_dim=c.head_dim,
            kv_heads=c.num_kv_heads,
            scale=c.head_dim**-0.5,
            window=run.window,
            kv_dtype=self.kv_dtype,
        )
        o = linear(a, "o_proj", c.hidden_size, c.o_bias)
        x = body(nn.Add, [x, o], self.hidden)
        h = body(nn.RmsNorm, [x], self.hidden, weight="mlp_norm", eps=c.rms_norm_eps)
        gate = linear(h, "gate_proj", c.intermediate_size, c.mlp_bias)
        up = linear(h, "up_proj", c.intermediate_size, c.mlp_bias)
        act = body(nn.Silu, [gate], gate.type)
        m = body(nn.Mul, [act, up], up.type)
        down = linear(m, "down_proj", c.hidden_size, c.mlp_bias)
        x = body(nn.Add, [x, down], self.hidden)
        h = body(nn.RmsNorm, [x], self.hidden, weight="next_norm", eps=c.rms_norm_eps)
        return body.function(run.name, [x, h])

    def head(self) -> nn.Func:
        body = Body({"h": self.hidden, "rows": self.rows})
        h, rows = body.arguments()
        last = body(nn.SelectOutputs, [h, rows], self.hidden)
        logits = body(nn.Linear, [last], self.type(self.c.vocab_size), weight="lm_head")
        if self.dtype != "float32":
            logits = body(nn.Cast, [logits], tensor("float32", None, self.c.vocab_size))
        _name(logits=logits)
        return body.function("head", [logits])

    # the weights program

    def weight(self, body: Body, name: str, source: str, *shape: int, last: str | None = None) -> None:
        value = body(weights.Tensor, [], tensor(self.dtype, *shape), source=source, last=last)
        _name(**{name: value})
        body(weights.Store, [value], weight=name)

    def load_embed(self) -> weights.Load:
        c, body = self.c, Body({})
        self.weight(body, "embed_tokens", "model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        self.weight(body, "first_norm", "model.layers.0.input_layernorm.weight", c.hidden_size)
        if c.rope.kind != "dynamic":
            values = {
                name: getattr(c.rope, name) for name in (*ROPE_PARAMETERS, *MORE_ROPE_PARAMETERS[c.rope.kind])
            }
            parameters = {
                name: attribute("", int(v) if isinstance(v, bool) else v)
                for name, v in values.items()
                if v is not None
            }
            table = body(
                weights.RopeTable,
                [],
                tensor("float32", c.max_positions, c.head_dim),
                kind=c.rope.kind,
                parameters=DictionaryAttr(parameters),
            )
            body(weights.Store, [table], weight="rope_table")
        return load_program("embed", 0, 1, body)

    def load_layer(self, run: Segment) -> weights.Load:
        c, body = self.c, Body({})
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        linears = (
            ("q_proj", "self_attn", q_size, c.hidden_size, c.qkv_bias),
            ("k_proj", "self_attn", kv_size, c.hidden_size, c.qkv_bias),
            ("v_proj", "self_attn", kv_size, c.hidden_size, c.qkv_bias),
            ("o_proj", "self_attn", c.hidden_size, q_size, c.o_bias),
            ("gate_proj", "mlp", c.intermediate_size, c.hidden_size, c.mlp_bias),
            ("up_proj", "mlp", c.intermediate_size, c.hidden_size, c.mlp_bias),
            ("down_proj", "mlp", c.hidden_size, c.intermediate_size, c.mlp_bias),
        )
        layer = "model.layers.{layer}"
        for name, part, rows, columns, bias in linears:
            self.weight(body, name, f"{layer}.{part}.{name}.weight", rows, columns)
            if bias:
                self.weight(body, f"{name.removesuffix('_proj')}_bias", f"{layer}.{part}.{name}.bias", rows)
        if c.qk_norm:
            self.weight(body, "q_norm", f"{layer}.self_attn.q_norm.weight", c.head_dim)
            self.weight(body, "k_norm", f"{layer}.self_attn.k_norm.weight", c.head_dim)
        self.weight(body, "mlp_norm", f"{layer}.post_attention_layernorm.weight", c.hidden_size)
        ends = run.first + run.count == c.num_layers
        self.weight(
            body,
            "next_norm",
            "model.layers.{layer+1}.input_layernorm.weight",
            c.hidden_size,
            last="model.norm.weight" if ends else None,
        )
        return load_program(run.name, run.first, run.count, body)

    def load_head(self) -> weights.Load:
        c, body = self.c, Body({})
        source = "model.embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"
        self.weight(body, "lm_head", source, c.vocab_size, c.hidden_size)
        return load_program("head", 0, 1, body)


def _name(**values: SSAValue) -> None:
    for name, value in values.items():
        value.name_hint = name
