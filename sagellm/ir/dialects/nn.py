"""The model graph: tensor operations over the rows of a step, symbolic in the token count `?`.

T is the number of tokens on the flattened axis, R the number of output rows, H the hidden size, V the vocabulary.
Weights are symbols (`@q_proj`), filled by the weights program; inside a layer function they mean that layer's.
"""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import (
    ArrayAttr,
    FloatAttr,
    FunctionType,
    IntegerAttr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    TensorType,
)
from xdsl.dialects.utils import parse_func_op_like, print_func_op_like
from xdsl.ir import Block, Dialect, Region, SSAValue
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, IsTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from sagellm.ir.attrs import DTYPES, RowsType, SamplingType, dtype_name, last_dim, shape_of
from sagellm.ir.syntax import SageOp
from sagellm.schemas import KV_SCALES


@irdl_op_definition
class Func(SageOp):
    """A function of the model graph."""

    name = "nn.func"
    sym_name = prop_def(SymbolNameConstraint())
    function_type = prop_def(FunctionType)
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface())

    @classmethod
    def new(cls, name: str, inputs: list, outputs: list, block: Block | None = None) -> Func:
        from sagellm.ir.attrs import word

        return cls.create(
            properties={"sym_name": word(name), "function_type": FunctionType.from_lists(inputs, outputs)},
            regions=[Region(block or Block(arg_types=inputs))],
        )

    def print(self, printer: Printer) -> None:
        print_func_op_like(
            printer,
            self.sym_name,
            self.function_type,
            self.body,
            self.attributes,
            reserved_attr_names=("sym_name", "function_type"),
        )

    @classmethod
    def parse(cls, parser: Parser) -> Func:
        parsed = parse_func_op_like(parser, reserved_attr_names=("sym_name", "function_type"))
        func = cls.new(parsed[0], list(parsed[1]), list(parsed[2]))
        func.detach_region(func.body)
        func.add_region(parsed[3])
        return func

    def verify_(self) -> None:
        last = self.body.block.last_op
        if not isinstance(last, Return):
            raise VerifyException("a function ends in nn.return")
        if last.operand_types != self.function_type.outputs.data:
            raise VerifyException("nn.return and the function's type differ")


@irdl_op_definition
class Return(SageOp):
    name = "nn.return"
    values = var_operand_def()
    traits = traits_def(IsTerminator())


@irdl_op_definition
class Call(SageOp):
    """Call a function once."""

    name = "nn.call"
    callee = prop_def(SymbolRefAttr)
    arguments = var_operand_def()
    outputs = var_result_def()
    READS: ClassVar = ("kv",)
    WRITES: ClassVar = ("kv",)
    SYMBOLS: ClassVar = ("callee",)


@irdl_op_definition
class Repeat(SageOp):
    """Call a layer function for layers `first` .. `first + count - 1`, each with its own weights and KV cache.

    The first arguments, as many as there are results, are replaced by the results from layer to layer.
    """

    name = "nn.repeat"
    callee = prop_def(SymbolRefAttr)
    first = prop_def(IntegerAttr)
    count = prop_def(IntegerAttr)
    arguments = var_operand_def()
    outputs = var_result_def()
    READS: ClassVar = ("kv",)
    WRITES: ClassVar = ("kv",)
    SYMBOLS: ClassVar = ("callee",)


@irdl_op_definition
class Embedding(SageOp):
    """Rows of the table `weight` [V, H] at the rows' token ids: [T, H].

    With `group`, each rank holds its part of the rows; tokens of other ranks' parts give zeros.
    """

    name = "nn.embedding"
    weight = prop_def(SymbolRefAttr)
    group = opt_prop_def(StringAttr)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("x",)


@irdl_op_definition
class Linear(SageOp):
    """`x @ weight.T + bias`; weight [out, in]. `layout` says how the weights program packed the weight."""

    name = "nn.linear"
    weight = prop_def(SymbolRefAttr)
    bias = opt_prop_def(SymbolRefAttr)
    layout = opt_prop_def(StringAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)

    def result_hints(self) -> tuple[str, ...]:
        return (self.weight.root_reference.data.removesuffix("_proj"),)

    def verify_(self) -> None:
        if dtype_name(self.x.type) != dtype_name(self.result.type):
            raise VerifyException("nn.linear keeps the dtype of its input")


@irdl_op_definition
class Split(SageOp):
    """Cut the last dimension into pieces of the given `sizes`."""

    name = "nn.split"
    sizes = prop_def(ArrayAttr[IntegerAttr])
    x = operand_def(TensorType)
    outputs = var_result_def(TensorType)

    def verify_(self) -> None:
        sizes = tuple(size.value.data for size in self.sizes.data)
        if sum(sizes) != last_dim(self.x.type) or sizes != tuple(last_dim(t) for t in self.result_types):
            raise VerifyException(
                f"nn.split of {last_dim(self.x.type)} into {list(sizes)} does not fit its results"
            )


@irdl_op_definition
class SplitRows(SageOp):
    """The first half of the tokens, rounded up, and the rest."""

    name = "nn.split_rows"
    x = operand_def(TensorType)
    first = result_def(TensorType)
    second = result_def(TensorType)
    HINTS: ClassVar = ("a", "b")

    def verify_(self) -> None:
        if not self.x.type == self.first.type == self.second.type:
            raise VerifyException("nn.split_rows wants one type for its input and both results")


@irdl_op_definition
class JoinRows(SageOp):
    """The tokens of `first`, then those of `second`."""

    name = "nn.join_rows"
    first = operand_def(TensorType)
    second = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("x",)

    def verify_(self) -> None:
        if not self.first.type == self.second.type == self.result.type:
            raise VerifyException("nn.join_rows wants one type for both inputs and the result")


@irdl_op_definition
class RmsNorm(SageOp):
    """`x / sqrt(mean(x^2) + eps) * weight` in float32 (Zhang & Sennrich 2019); `heads`: each head by itself."""

    name = "nn.rms_norm"
    weight = prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)
    heads = opt_prop_def(IntegerAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("h",)


@irdl_op_definition
class Add(SageOp):
    name = "nn.add"
    x = operand_def(TensorType)
    y = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("x",)

    def verify_(self) -> None:
        if not self.x.type == self.y.type == self.result.type:
            raise VerifyException("nn.add wants one type for both inputs and the result")


@irdl_op_definition
class AddRmsNorm(SageOp):
    """The residual stream `x + y`, and its norm."""

    name = "nn.add_rms_norm"
    weight = prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)
    x = operand_def(TensorType)
    y = operand_def(TensorType)
    total = result_def(TensorType)
    normed = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("x", "h")


@irdl_op_definition
class Quantize(SageOp):
    """Each token [T, N] as int8 values of a scale of its own, float32 [T]: `round(x / scale)`, halves to even, where
    the scale is the largest magnitude over 127. A token of zeros stays one, of scale 0."""

    name = "nn.quantize"
    x = operand_def(TensorType)
    values = result_def(TensorType)
    scales = result_def(TensorType)
    HINTS: ClassVar = ("values", "scales")

    def verify_(self) -> None:
        _verify_quantized(self, self.x, self.values, self.scales)


@irdl_op_definition
class RmsNormQuantize(SageOp):
    """`nn.quantize` of the norm."""

    name = "nn.rms_norm_quantize"
    weight = prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)
    x = operand_def(TensorType)
    values = result_def(TensorType)
    scales = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("values", "scales")

    def verify_(self) -> None:
        _verify_quantized(self, self.x, self.values, self.scales)


@irdl_op_definition
class AddRmsNormQuantize(SageOp):
    """The residual stream `x + y`, and `nn.quantize` of its norm."""

    name = "nn.add_rms_norm_quantize"
    weight = prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)
    x = operand_def(TensorType)
    y = operand_def(TensorType)
    total = result_def(TensorType)
    values = result_def(TensorType)
    scales = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("x", "values", "scales")

    def verify_(self) -> None:
        _verify_quantized(self, self.x, self.values, self.scales)


def _verify_quantized(op: SageOp, x: SSAValue, values: SSAValue, scales: SSAValue) -> None:
    if len(shape_of(x.type)) != 2:
        raise VerifyException(f"{op.name} wants tokens and their values, two dimensions")
    rows, width = shape_of(x.type)
    if values.type != TensorType(DTYPES["int8"], [rows, width]):
        raise VerifyException(f"{op.name} gives int8 values in the shape of its input")
    if scales.type != TensorType(DTYPES["float32"], [rows]):
        raise VerifyException(f"{op.name} gives one float32 scale for each token")


@irdl_op_definition
class Silu(SageOp):
    name = "nn.silu"
    x = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("act",)


@irdl_op_definition
class Mul(SageOp):
    name = "nn.mul"
    x = operand_def(TensorType)
    y = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("m",)


@irdl_op_definition
class SiluMul(SageOp):
    """`silu(first half) * second half` of the last dimension (SwiGLU, Shazeer 2020)."""

    name = "nn.silu_mul"
    x = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("m",)

    def verify_(self) -> None:
        if last_dim(self.x.type) != 2 * last_dim(self.result.type):
            raise VerifyException("nn.silu_mul halves the last dimension")


@irdl_op_definition
class Cast(SageOp):
    name = "nn.cast"
    x = operand_def(TensorType)
    result = result_def(TensorType)


@irdl_op_definition
class RopeGather(SageOp):
    """cos and sin of the rows' positions: rows of the table `weight` [positions, D]: [T, D], cos before sin."""

    name = "nn.rope_gather"
    weight = prop_def(SymbolRefAttr)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("angles",)


@irdl_op_definition
class RopeDynamic(SageOp):
    """cos and sin with frequencies that depend on the length of each row's sequence (dynamic NTK): [T, D]."""

    name = "nn.rope_dynamic"
    theta = prop_def(FloatAttr)
    factor = prop_def(FloatAttr)
    original = prop_def(IntegerAttr)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("angles",)


@irdl_op_definition
class Rope(SageOp):
    """Rotate the halves of every head of q and k by the angles [T, D] (Su et al. 2021)."""

    name = "nn.rope"
    head_dim = prop_def(IntegerAttr)
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    angles = operand_def(TensorType)
    q_out = result_def(TensorType)
    k_out = result_def(TensorType)
    HINTS: ClassVar = ("q", "k")


class _Caches(SageOp):
    """`kv_dtype` says how the cache holds keys and values; without it, as they are.

    int8: whole numbers from -127 to 127, symmetric, with a float32 scale for each token, head, key and value, which is
    the greatest magnitude / 127. What is read is the number times its scale.
    """

    kv_dtype = opt_prop_def(StringAttr)

    def verify_(self) -> None:
        if self.kv_dtype is not None and self.kv_dtype.data not in KV_SCALES:
            raise VerifyException(f"kv_dtype is {self.kv_dtype.data!r}; accepted: {', '.join(KV_SCALES)}")


@irdl_op_definition
class KvWrite(_Caches):
    """Write keys and values [T, heads * D] to the rows' slots of this layer's cache."""

    name = "nn.kv_write"
    head_dim = prop_def(IntegerAttr)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    rows = operand_def(RowsType)
    WRITES: ClassVar = ("kv",)


@irdl_op_definition
class RopeKvWrite(_Caches):
    """`nn.rope`, and `nn.kv_write` of the rotated keys and the values; gives the rotated queries.

    With `q_norm` and `k_norm`, each head is normalised before, as `nn.rms_norm` with `heads` does.
    """

    name = "nn.rope_kv_write"
    head_dim = prop_def(IntegerAttr)
    q_norm = opt_prop_def(SymbolRefAttr)
    k_norm = opt_prop_def(SymbolRefAttr)
    eps = opt_prop_def(FloatAttr)
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    angles = operand_def(TensorType)
    rows = operand_def(RowsType)
    q_out = result_def(TensorType)
    WRITES: ClassVar = ("kv",)
    HINTS: ClassVar = ("q",)

    def verify_(self) -> None:
        super().verify_()
        if len({self.q_norm is None, self.k_norm is None, self.eps is None}) != 1:
            raise VerifyException("nn.rope_kv_write wants q_norm, k_norm and eps together, or none of them")
        if self.q.type != self.q_out.type or self.k.type != self.v.type:
            raise VerifyException("nn.rope_kv_write keeps the type of q; k and v have one type")


@irdl_op_definition
class Attention(_Caches):
    """Causal attention of q [T, heads * D] over each row's cached keys and values; `window` limits how far back."""

    name = "nn.attention"
    head_dim = prop_def(IntegerAttr)
    kv_heads = prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    window = opt_prop_def(IntegerAttr)
    q = operand_def(TensorType)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    READS: ClassVar = ("kv",)
    HINTS: ClassVar = ("attn",)


@irdl_op_definition
class SelectOutputs(SageOp):
    """The rows whose next token is wanted: [R, H]."""

    name = "nn.select_outputs"
    x = operand_def(TensorType)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("last",)


@irdl_op_definition
class Pool(SageOp):
    """One vector for each sequence: the mean of its hidden states, the `last`, or the first (`cls`): [R, H] float32.

    Sequences are forwarded whole.
    """

    name = "nn.pool"
    kind = prop_def(StringAttr)
    x = operand_def(TensorType)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("vectors",)


class _Warp(SageOp):
    """A change of the logits [R, V] by the sampling columns."""

    logits = operand_def(TensorType)
    how = operand_def(SamplingType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("logits",)


@irdl_op_definition
class Allow(_Warp):
    """Tokens that the row's grammar does not allow get -inf; rows without a grammar stay as they are."""

    name = "nn.allow"


@irdl_op_definition
class Bias(_Warp):
    """Add each row's biases to its tokens; end tokens get -inf while the sequence is shorter than it has to be."""

    name = "nn.bias"


@irdl_op_definition
class Penalize(_Warp):
    """Repetition penalty over prompt and output; frequency and presence penalty over the output."""

    name = "nn.penalize"


@irdl_op_definition
class Temperature(_Warp):
    """Divide by the temperature; rows with 0 stay as they are."""

    name = "nn.temperature"


@irdl_op_definition
class TopK(_Warp):
    """Keep the k largest; 0 keeps all."""

    name = "nn.top_k"


@irdl_op_definition
class TopP(_Warp):
    """Keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2019)."""

    name = "nn.top_p"


@irdl_op_definition
class TopKTopP(_Warp):
    """`nn.top_k`, then `nn.top_p`."""

    name = "nn.top_k_top_p"


@irdl_op_definition
class MinP(_Warp):
    """Keep tokens of at least p times the likeliest one's probability."""

    name = "nn.min_p"


@irdl_op_definition
class Draw(_Warp):
    """One token per row by the row's uniform number; greedy rows take the likeliest: [R]."""

    name = "nn.draw"
    HINTS: ClassVar = ("tokens",)


@irdl_op_definition
class Argmax(SageOp):
    """The likeliest token of each row: [R]."""

    name = "nn.argmax"
    logits = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("tokens",)


NN = Dialect(
    "nn",
    [
        Func, Return, Call, Repeat, Embedding, Linear, Split, SplitRows, JoinRows, RmsNorm, Add, AddRmsNorm, Quantize,
        RmsNormQuantize, AddRmsNormQuantize, Silu, Mul, SiluMul, Cast, RopeGather, RopeDynamic, Rope, KvWrite,
        RopeKvWrite, Attention, SelectOutputs, Pool, Allow, Bias, Penalize, Temperature, TopK, TopP, TopKTopP, MinP,
        Draw, Argmax,
    ],
    [],
)  # fmt: skip
