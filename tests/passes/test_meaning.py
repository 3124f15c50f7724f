"""Passes keep the meaning of every graph, and a pass that does not is caught and named."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, every_kernel, examples, model_configs, small_model

from sagellm.batch import Batch, Columns, Phase, Request, SamplingParams
from sagellm.ir.dialects import batch as b
from sagellm.ir.dialects import nn
from sagellm.ir.edit import erase, replace
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import lower, step_graph
from sagellm.meaning.check import (
    MeaningChanged,
    check_batch_passes,
    check_model_passes,
    check_pass,
    check_pipeline,
)
from sagellm.meaning.inputs import small_rows
from sagellm.models.config import RopeConfig
from sagellm.models.decoder import build_model
from sagellm.passes import DEFAULT, kernel_fusion, pipeline
from sagellm.passes.driver import Pass, Pipeline, StepView, rewrites
from sagellm.passes.kernel_fusion import KernelFusion
from sagellm.passes.prefix_dedup import PrefixDedup

ORDERS = st.lists(st.sampled_from(DEFAULT.split(",")), max_size=5).map(",".join)
"""Pipelines: some of the passes, in any order, some twice."""


@examples(60)
@given(model_configs(), ORDERS, st.integers(0, 99))
def test_any_pipeline_keeps_what_a_model_computes(config, passes, seed):
    graph = build_model(config, "float32", ("decode", "prefill"))
    check_model_passes(graph, pipeline(passes), every_kernel(), rows=small_rows(graph, seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_default_pipeline_keeps_what_a_model_of_this_dtype_computes(dtype):
    config = small_model(qk_norm=True, qkv_bias=True, num_kv_heads=1, windows=(None, None, 3))
    check_model_passes(build_model(config, dtype, ("decode",)), pipeline(), every_kernel())


@examples(60)
@given(model_configs(), batches(), ORDERS)
def test_any_pipeline_keeps_what_a_step_computes(config, batch, order):
    if config.rope.kind == "dynamic":
        batch.columns.alike_up_to = config.rope.original_max_positions
    passes = pipeline(f"prefix-dedup,{order}".rstrip(","))
    passes.decide(batch, StepView())
    step = step_graph(lower(batch, config.vocab_size))
    model = build_model(config, "float32", ("decode", "prefill"))
    check_batch_passes(step, passes, every_kernel(), batch, model)


def test_checking_leaves_the_graphs_as_they_are():
    graph, context = model(), every_kernel()
    batch = prompts([1, 2, 3, 4], [1, 2, 3, 5])
    step = step_graph(lower(batch, 7))
    texts = graph.text(), step.text(tables=True)
    check_model_passes(graph, pipeline(), context)
    check_batch_passes(step, pipeline(), context, batch, graph)
    assert (graph.text(), step.text(tables=True)) == texts
    assert not context.remarks


# broken passes


def model(**fields) -> IRGraph:
    return build_model(small_model(**fields), "float32", ("decode", "prefill"))


def prompts(*texts: list[int], temperature: float = 0.0) -> Batch:
    columns = Columns(len(texts), 32, 4)
    for row, text in enumerate(texts):
        columns.fill(row, Request(str(row), text, SamplingParams(temperature=temperature)), seed=row)
    columns.new[:] = columns.length
    return Batch(columns, np.zeros(0, np.int64), np.arange(len(texts)))


def test_a_fusion_that_joins_in_the_wrong_order_is_caught(monkeypatch):
    join = kernel_fusion._join
    monkeypatch.setattr(kernel_fusion, "_join", lambda *given: join(*given[:-1], given[-1][::-1]))
    with pytest.raises(
        MeaningChanged, match=r"pass kernel-fusion changed %q in .*@layers\.dense\), layer 0: "
    ):
        check_model_passes(model(), pipeline(), every_kernel())
    with pytest.raises(MeaningChanged, match="pass kernel-fusion changed"):
        check_pass("kernel-fusion", model(qkv_bias=True), every_kernel())


@dataclass(frozen=True)
class GateAfterUp(Pass):
    """Takes up for the gate: the halves of the product change places."""

    name = "gate-after-up"
    graph = "model"

    @rewrites(nn.SiluMul)
    def swap(self, op, graph, context):
        linear = op.x.owner
        halves = [linear.result.type.get_shape()[1] // 2] * 2
        split = nn.Split.create(
            operands=[linear.result],
            result_types=[op.result.type] * 2,
            properties=kernel_fusion.properties({"sizes": halves}),
        )
        act = nn.Silu.create(operands=[split.results[1]], result_types=[op.result.type])
        m = nn.Mul.create(operands=[act.result, split.results[0]], result_types=[op.result.type])
        kernel_fusion.insert_before(op, split, act, m)
        replace(op, [m.result])


@dataclass(frozen=True)
class ForgetsTheCache(Pass):
    name = "forgets-the-cache"
    graph = "model"

    @rewrites(nn.KvWrite)
    def forget(self, op, graph, context):
        erase(op)


@dataclass(frozen=True)
class WiderWindow(Pass):
    name = "wider-window"
    graph = "model"

    @rewrites(nn.Attention)
    def widen(self, op, graph, context):
        if op.window is not None:
            op.properties["window"] = kernel_fusion.properties({"window": op.window.value.data + 1})["window"]


@dataclass(frozen=True)
class SharesTooMuch(PrefixDedup):
    """One token more than is equal."""

    def decide(self, batch: Batch, view: StepView) -> None:
        super().decide(batch, view)
        c = batch.columns
        following = [row for row in batch.prefill if c.leader[row] >= 0]
        c.shared[following] += 1


@dataclass(frozen=True)
class DropsDecodes(Pass):
    name = "drops-decodes"
    graph = "batch"

    @rewrites(b.Group)
    def drop(self, op, graph, context):
        if op.phase.data != Phase.DECODE.name.lower():
            return
        for use in list(op.result.uses):
            use.operation.operands = [v for v in use.operation.operands if v is not op.result]
        erase(op)


def test_swapped_halves_are_caught():
    passes = Pipeline([KernelFusion(), GateAfterUp()])
    with pytest.raises(MeaningChanged, match=r"pass gate-after-up changed %m in %m = nn\.mul"):
        check_model_passes(model(), passes, every_kernel())


def test_a_cache_that_is_not_written_is_caught():
    with pytest.raises(MeaningChanged, match="pass forgets-the-cache"):
        check_pass(ForgetsTheCache(), model(), every_kernel())


def test_a_window_that_is_one_too_wide_is_caught():
    with pytest.raises(
        MeaningChanged, match=r"pass wider-window changed %attn in .*nn\.attention .*@layers\.window"
    ):
        check_pass(WiderWindow(), model(), every_kernel())


def test_sharing_one_token_too_many_is_caught():
    batch = prompts([1, 2, 3, 4, 5], [1, 2, 3, 6, 5], [4, 4])
    with pytest.raises(MeaningChanged, match="pass prefix-dedup changed the logits of sequence 1: "):
        check_pipeline(Pipeline([SharesTooMuch()]), every_kernel(), model(), batch)
    check_pipeline(Pipeline([PrefixDedup()]), every_kernel(), model(), batch)


def test_sharing_more_than_a_prompt_has_is_caught():
    batch = prompts([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4])
    with pytest.raises(MeaningChanged, match="pass prefix-dedup left a graph that cannot be evaluated"):
        check_pipeline(Pipeline([SharesTooMuch()]), every_kernel(), model(), batch)


def test_sharing_keys_that_depend_on_the_length_is_caught():
    rope = RopeConfig(kind="dynamic", factor=2.0, rotary_dim=4, original_max_positions=4)
    texts = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 1, 2, 3]
    with pytest.raises(MeaningChanged, match="pass prefix-dedup changed"):
        check_pipeline(pipeline("prefix-dedup"), every_kernel(), model(rope=rope), prompts(*texts))
    batch = prompts(*texts, texts[1])
    batch.columns.alike_up_to = 4
    check_pipeline(pipeline("prefix-dedup"), every_kernel(), model(rope=rope), batch)
    assert batch.columns.shared.tolist() == [0, 0, 9]


def test_a_lost_sequence_is_caught():
    batch = prompts([1, 2, 3], [4, 5])
    batch.columns.context[1], batch.columns.new[1] = 1, 1
    batch.decode, batch.prefill = np.array([1]), np.array([0])
    with pytest.raises(
        MeaningChanged,
        match=r"pass drops-decodes changed which sequences get a token: \[0, 1\] before, \[0\] after",
    ):
        check_pass(DropsDecodes(), step_graph(lower(batch, 7)), every_kernel(), batch, model())


def test_a_message_is_one_line():
    with pytest.raises(MeaningChanged) as caught:
        check_pass(WiderWindow(), model(), every_kernel())
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("tolerance 1e-05")
