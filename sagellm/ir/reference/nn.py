"""The meaning of the `nn` operations. Sums and functions are in float32, results in the operation's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm import random
from sagellm.batch import Stage
from sagellm.errors import UserError
from sagellm.ir.attrs import last_dim
from sagellm.ir.dialects import nn
from sagellm.ir.reference.values import How, LogicalRows, ModelScope, dtype_of

COLDEST = 1e-6
"""Temperatures between 0 and this count as this, so that logits stay finite; the draw is the argmax by then."""


def call(scope: ModelScope, op: nn.Call, *arguments) -> tuple:
    return scope.call(op.callee.root_reference.data, scope.layer, arguments)


def repeat(scope: ModelScope, op: nn.Repeat, *arguments) -> tuple:
    carried = arguments[: len(op.results)]
    rest = arguments[len(op.results) :]
    first = op.first.value.data
    for layer in range(first, first + op.count.value.data):
        carried = scope.call(op.callee.root_reference.data, layer, (*carried, *rest))
    return carried


def embedding(scope: ModelScope, op: nn.Embedding, rows: LogicalRows) -> Tensor:
    table, tokens = scope.weight(op.weight), rows.tokens
    if op.group is None:
        return table[tokens]
    rank, _ = scope.exchange(op.group.data, table[:0])
    mine = tokens - rank * len(table)
    elsewhere = (mine < 0) | (mine >= len(table))
    return table[mine.masked_fill(elsewhere, 0)].masked_fill(elsewhere[:, None], 0)


def linear(scope: ModelScope, op: nn.Linear, x: Tensor) -> Tensor:
    y = x.float() @ scope.weight(op.weight).float().T
    if op.bias is not None:
        y = y + scope.weight(op.bias).float()
    return y.to(x.dtype)


def split(scope: ModelScope, op: nn.Split, x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, [last_dim(t) for t in op.result_types], dim=-1)


def split_rows(scope: ModelScope, op: nn.SplitRows, x: Tensor) -> tuple[Tensor, Tensor]:
    half = (len(x) + 1) // 2
    return x[:half], x[half:]


def join_rows(scope: ModelScope, op: nn.JoinRows, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide / (wide.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight.float()).to(x.dtype)


def rms_norm(scope: ModelScope, op: nn.RmsNorm, x: Tensor) -> Tensor:
    parts = x if op.heads is None else x.unflatten(-1, (op.heads.value.data, -1))
    return _normed(parts, scope.weight(op.weight), op.eps.value.data).reshape(x.shape)


def add(scope: ModelScope, op: nn.Add, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def add_rms_norm(scope: ModelScope, op: nn.AddRmsNorm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, _normed(total, scope.weight(op.weight), op.eps.value.data)


def quantize(scope: ModelScope, op: nn.Quantize, x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(x)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(dim=-1) / 127
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / divisors[..., None]).round().to(torch.int8), scales


def rms_norm_quantize(scope: ModelScope, op: nn.RmsNormQuantize, x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(_normed(x, scope.weight(op.weight), op.eps.value.data))


def add_rms_norm_quantize(
    scope: ModelScope, op: nn.AddRmsNormQuantize, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + y
    return total, *_quantized(_normed(total, scope.weight(op.weight), op.eps.value.data))


def silu(scope: ModelScope, op: nn.Silu, x: Tensor) -> Tensor:
    return (x.float() / (1 + (-x.float()).exp())).to(x.dtype)


def mul(scope: ModelScope, op: nn.Mul, x: Tensor, y: Tensor) -> Tensor:
    return x * y


def silu_mul(scope: ModelScope, op: nn.SiluMul, x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up).to(x.dtype)


def cast(scope: ModelScope, op: nn.Cast, x: Tensor) -> Tensor:
    return x.to(dtype_of(op.result.type, scope.exact))


def rope_gather(scope: ModelScope, op: nn.RopeGather, rows: LogicalRows) -> Tensor:
    return scope.weight(op.weight)[rows.positions]


def rope_dynamic(scope: ModelScope, op: nn.RopeDynamic, rows: LogicalRows) -> Tensor:
    """Dynamic NTK: theta grows with the length of the sequence, once it is longer than the original context."""
    dim, original, factor = last_dim(op.result.type), op.original.value.data, op.factor.value.data
    lengths = rows.lengths.float().clamp(min=original)
    theta = op.theta.value.data * (factor * lengths / original - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2).float() / dim
    angles = rows.positions.float()[:, None] / theta[:, None] ** exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope(scope: ModelScope, op: nn.Rope, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, angles), _rotated(k, angles)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [T, heads * D], angles [T, D]: dimension i of a head turns with i + D/2."""
    cos, sin = angles[:, None].chunk(2, dim=-1)
    first, second = x.float().unflatten(-1, (-1, angles.shape[-1])).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.reshape(x.shape).to(x.dtype)


def kv_write(scope: ModelScope, op: nn.KvWrite, k: Tensor, v: Tensor, rows: LogicalRows) -> None:
    _append(scope, op, k, v, rows)


def _append(
    scope: ModelScope, op: nn.KvWrite | nn.RopeKvWrite, k: Tensor, v: Tensor, rows: LogicalRows
) -> None:
    k, v = (x.unflatten(-1, (-1, op.head_dim.value.data)) for x in (k, v))
    if op.kv_dtype is not None and not scope.exact:
        k, v = _through_int8(k), _through_int8(v)
    for sequence, at in rows.parts():
        layers = scope.cache.setdefault(sequence.row, {})
        keys, values = layers.get(scope.kv_layer, (k[:0], v[:0]))
        if sequence.positions.start != len(keys):
            raise UserError(
                f"nn.kv_write: sequence {sequence.row} writes position {sequence.positions.start} of layer "
                f"{scope.layer}, where {len(keys)} are cached; accepted: the next position"
            )
        layers[scope.kv_layer] = torch.cat((keys, k[at])), torch.cat((values, v[at]))


def _through_int8(x: Tensor) -> Tensor:
    """[T, heads, D] as it comes back from an int8 cache, float32."""
    numbers, scales = _quantized(x)
    return numbers * scales[..., None]


def rope_kv_write(
    scope: ModelScope, op: nn.RopeKvWrite, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, rows: LogicalRows
) -> Tensor:
    if op.eps is not None and op.q_norm is not None and op.k_norm is not None:
        d, eps = op.head_dim.value.data, op.eps.value.data
        q, k = (
            _normed(x.unflatten(-1, (-1, d)), scope.weight(weight), eps).reshape(x.shape)
            for x, weight in ((q, op.q_norm), (k, op.k_norm))
        )
    _append(scope, op, _rotated(k, angles), v, rows)
    return _rotated(q, angles)


def attention(scope: ModelScope, op: nn.Attention, q: Tensor, rows: LogicalRows) -> Tensor:
    """With window w a token sees itself and the w - 1 before it (transformers, `sliding_window_overlay`)."""
    queries = q.float().unflatten(-1, (-1, op.head_dim.value.data))
    result = torch.zeros_like(queries)
    queries_per_kv_head = queries.shape[1] // op.kv_heads.value.data
    for sequence, at in rows.parts():
        keys, values = (x.float() for x in scope.cache[sequence.row][scope.kv_layer])
        query_at = torch.tensor(sequence.positions)[:, None]
        key_at = torch.arange(len(keys))[None, :]
        visible = key_at <= query_at
        if op.window is not None:
            visible &= key_at > query_at - op.window.value.data
        for head in range(queries.shape[1]):
            kv_head = head // queries_per_kv_head
            scores = queries[at, head] @ keys[:, kv_head].T * op.scale.value.data
            weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
            result[at, head] = weights @ values[:, kv_head]
    return result.reshape(q.shape).to(q.dtype)


def select_outputs(scope: ModelScope, op: nn.SelectOutputs, x: Tensor, rows: LogicalRows) -> Tensor:
    return x[rows.outputs]


def pool(scope: ModelScope, op: nn.Pool, x: Tensor, rows: LogicalRows) -> Tensor:
    parts = [x[part].float() for _, part in rows.parts()]
    how = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "cls": lambda h: h[0]}[op.kind.data]
    return torch.stack([how(part) for part in parts])


def allow(scope: ModelScope, op: nn.Allow, logits: Tensor, how: How) -> Tensor:
    result, c = logits.clone(), how.columns
    for index, row in enumerate(how.rows):
        if c.stages[row] & Stage.GRAMMAR:
            for token in range(logits.shape[1]):
                if not int(c.allowed[row, token // 32]) >> token % 32 & 1:
                    result[index, token] = -torch.inf
    return result


def bias(scope: ModelScope, op: nn.Bias, logits: Tensor, how: How) -> Tensor:
    result, c = logits.clone(), how.columns
    for index, row in enumerate(how.rows):
        for token, value in zip(c.bias_tokens[row].tolist(), c.bias[row].tolist()):
            if token >= 0:
                result[index, token] += value
        for token in c.stops[row].tolist():
            if token >= 0 and c.length[row] < c.minimum[row]:
                result[index, token] = -torch.inf
    return result


def penalize(scope: ModelScope, op: nn.Penalize, logits: Tensor, how: How) -> Tensor:
    result, c = logits.clone(), how.columns
    for index, row in enumerate(how.rows):
        known = c.tokens[row, : c.length[row]].tolist()
        output = known[c.prompt[row] :]
        for token in set(known):
            repetition = float(c.repetition[row])
            score = result[index, token]
            result[index, token] = score * repetition if score < 0 else score / repetition
        for token in set(output):
            result[index, token] -= output.count(token) * float(c.frequency[row]) + float(c.presence[row])
    return result


def temperature(scope: ModelScope, op: nn.Temperature, logits: Tensor, how: How) -> Tensor:
    result = logits.clone()
    for index, value in enumerate(how.column("temperature").tolist()):
        if value > 0:
            result[index] /= max(value, COLDEST)
    return result


def top_k(scope: ModelScope, op: nn.TopK, logits: Tensor, how: How) -> Tensor:
    return _top_k(logits, how)


def _top_k(logits: Tensor, how: How) -> Tensor:
    """Tokens as likely as the k-th stay too."""
    result = logits.clone()
    for index, k in enumerate(how.column("top_k").tolist()):
        if 0 < k < logits.shape[1]:
            result[index, logits[index] < logits[index].sort(descending=True).values[k - 1]] = -torch.inf
    return result


def top_p(scope: ModelScope, op: nn.TopP, logits: Tensor, how: How) -> Tensor:
    return _top_p(logits, how)


def _top_p(logits: Tensor, how: How) -> Tensor:
    """Among equally likely tokens those of greater id stay, as transformers' ascending sort leaves them."""
    result = torch.full_like(logits, -torch.inf)
    for index, p in enumerate(how.column("top_p").astype(float).tolist()):
        probabilities = logits[index].double().softmax(dim=-1)
        reached = 0.0
        for token in reversed(probabilities.sort(stable=True).indices.tolist()):
            if reached >= p and p < 1:
                break
            result[index, token] = logits[index, token]
            reached += float(probabilities[token])
    return result


def top_k_top_p(scope: ModelScope, op: nn.TopKTopP, logits: Tensor, how: How) -> Tensor:
    return _top_p(_top_k(logits, how), how)


def min_p(scope: ModelScope, op: nn.MinP, logits: Tensor, how: How) -> Tensor:
    result = logits.clone()
    for index, p in enumerate(how.column("min_p").tolist()):
        probabilities = logits[index].softmax(dim=-1)
        result[index, probabilities < p * probabilities.max()] = -torch.inf
    return result


def draw(scope: ModelScope, op: nn.Draw, logits: Tensor, how: How) -> Tensor:
    """The first token at which the sum of probabilities exceeds the row's uniform number."""
    numbers = random.uniform(how.column("seed"), how.column("length"), how.column("sample"))
    chosen = []
    for index, (number, temperature) in enumerate(zip(numbers, how.column("temperature"))):
        if temperature == 0:
            chosen.append(int(logits[index].argmax()))
            continue
        mass = logits[index].double().softmax(dim=-1).cumsum(dim=-1)
        chosen.append(int((mass > number * mass[-1]).nonzero()[0]))
    return torch.tensor(chosen, dtype=torch.int64)


def argmax(scope: ModelScope, op: nn.Argmax, logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


MEANINGS = {
    nn.Call: call,
    nn.Repeat: repeat,
    nn.Embedding: embedding,
    nn.Linear: linear,
    nn.Split: split,
    nn.SplitRows: split_rows,
    nn.JoinRows: join_rows,
    nn.RmsNorm: rms_norm,
    nn.Add: add,
    nn.AddRmsNorm: add_rms_norm,
    nn.Quantize: quantize,
    nn.RmsNormQuantize: rms_norm_quantize,
    nn.AddRmsNormQuantize: add_rms_norm_quantize,
    nn.Silu: silu,
    nn.Mul: mul,
    nn.SiluMul: silu_mul,
    nn.Cast: cast,
    nn.RopeGather: rope_gather,
    nn.RopeDynamic: rope_dynamic,
    nn.Rope: rope,
    nn.KvWrite: kv_write,
    nn.RopeKvWrite: rope_kv_write,
    nn.Attention: attention,
    nn.SelectOutputs: select_outputs,
    nn.Pool: pool,
    nn.Allow: allow,
    nn.Bias: bias,
    nn.Penalize: penalize,
    nn.Temperature: temperature,
    nn.TopK: top_k,
    nn.TopP: top_p,
    nn.TopKTopP: top_k_top_p,
    nn.MinP: min_p,
    nn.Draw: draw,
    nn.Argmax: argmax,
}
