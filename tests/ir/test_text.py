"""Graphs are text: what is printed reads back to the same, and malformed text gives one line."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, every_kernel, examples, model_configs, small_model

from sagellm.batch import Batch, Columns, Request, SamplingParams
from sagellm.errors import UserError
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import lower, step_graph
from sagellm.models.decoder import build_model, build_sampler
from sagellm.passes import pipeline
from sagellm.passes.driver import StepView

STAGES = ("penalties", "draw", "top_k", "top_p", "min_p")


def assert_reads_back(graph: IRGraph, **how) -> None:
    text = graph.text(**how)
    again = IRGraph.parse(text)
    again.verify()
    assert again.text(**how) == text
    assert again.module.is_structurally_equivalent(graph.module) or has_tables(graph)


def has_tables(graph: IRGraph) -> bool:
    """Tables are compared by identity."""
    return graph.step is not None


@examples(40)
@given(batches(), st.booleans())
def test_steps_read_back(batch, share):
    passes = pipeline("prefix-dedup" if share else "")
    passes.decide(batch, StepView())
    graph = step_graph(lower(batch, 5))
    passes.run(graph, "batch", every_kernel())
    for tables in (False, True):
        for generic in (False, True):
            assert_reads_back(graph, tables=tables, generic=generic)


@examples(30)
@given(batches())
def test_values_of_tables_read_back(batch):
    graph = step_graph(lower(batch, 5))
    again = IRGraph.parse(graph.text(tables=True))
    for one, other in zip(groups(graph), groups(again), strict=True):
        for name, column in one.columns.items():
            assert column.tolist() == other.columns[name].tolist()


def groups(graph: IRGraph) -> list:
    return [op.table.data for op in graph.walk() if op.name == "batch.group"]


@examples(8)
@given(model_configs(), st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans())
def test_models_read_back(config, dtype, passes):
    graph = build_model(config, dtype, ("decode", "prefill")).merged(build_sampler(9, STAGES))
    if passes:
        pipeline().run(graph, "model", every_kernel())
    for generic in (False, True):
        assert_reads_back(graph, generic=generic)


@examples(8)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back_to_the_last_bit(value):
    graph = build_model(small_model(rms_norm_eps=value), "float32", ("decode",))
    for generic in (False, True):
        again = IRGraph.parse(graph.text(generic=generic))
        assert {op.eps.value.data for op in again.walk() if op.name == "nn.rms_norm"} == {value}


FUNCTION = """builtin.module {{
  nn.func @f(%x: tensor<?x4xf32>) -> tensor<?x4xf32> {{
    {}
    nn.return %x
  }}
}}
"""
MALFORMED = {
    "%y = nn.turn %x : tensor<?x4xf32>": r"bad:3:\d+: Operation nn\.turn is not registered",
    "%y = nn.silu %z : tensor<?x4xf32>": r"bad:3:\d+: .*(before|defined)",
    "%y = nn.linear %x, @w {colour = red} : tensor<?x4xf32>": (
        r"bad:3:\d+: unknown property colour of nn\.linear; accepted: weight, bias, layout"
    ),
    "%y = nn.linear %x : tensor<?x4xf32>": r"bad:3:\d+: nn\.linear wants the symbol of its weight",
    "%y = nn.linear %x, @w, @b : tensor<?x4xf32>": r"bad:3:\d+: nn\.linear takes 1 symbols",
    "%y = nn.silu %x : tensor<?x4xf99>": r"bad:3:\d+: ",
    "%y = nn.silu %x : !nn.hidden": r"bad:\d:\d+: 'nn.hidden' is not registered",
    "%y = nn.silu %x": r"bad:3:\d+: Operation has 0 results, but was given 1 to bind",
    "%y = nn.linear %x, @w {": r"bad:\d:\d+: ",
    '%y = nn.linear %x, @w {layout = "one': r"bad:3:\d+: ",
    "%y = nn.split %x {sizes = [1, : tensor<?x4xf32>": r"bad:3:\d+: ",
    "%y = batch.group {table = #batch.table<two rows>} : !batch.group": r"bad:3:\d+: ",
}
NOT_VERIFIED = {
    "%y = nn.add %x : tensor<?x4xf32>": r"%y = nn\.add \(operation 1 of @f\): has 1 operands, wants 2",
    "%y = nn.silu %x, %x : tensor<?x4xf32>": r"has 2 operands, wants 1",
    "%y = nn.call %x, @g : tensor<?x4xf32>": r"no function @g; accepted: @f",
    "%y = nn.rms_norm %x, @w : tensor<?x4xf32>": r"lacks the property eps",
    "%y = nn.rms_norm %x, @w {eps = 3} : tensor<?x4xf32>": r"nn\.rms_norm.*3 : i64 should be",
    "%y = nn.add %x, %x : tensor<?x5xf32>": r"nn\.add wants one type",
    "%y = nn.split %x {sizes = [a]} : tensor<?x4xf32>": r"nn\.split",
    "%y = nn.split %x {sizes = [3]} : tensor<?x3xf32>": r"nn\.split of 4 into \[3\]",
    "%y = nn.silu_mul %x : tensor<f32>": r"nn\.silu_mul",
    "nn.return %x, %x": r".",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_text_gives_one_line_with_the_place(line):
    with pytest.raises(UserError, match=MALFORMED[line]) as caught:
        IRGraph.parse(FUNCTION.format(line), "bad")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", NOT_VERIFIED)
def test_a_wrong_graph_gives_one_line(line):
    with pytest.raises(UserError, match=NOT_VERIFIED[line]) as caught:
        IRGraph.parse(FUNCTION.format(line)).verify()
    assert "\n" not in str(caught.value)


def good_texts() -> list[list[str]]:
    """A step and a model graph, cut into tokens."""
    columns = Columns(4, 32, 4)
    for row in range(4):
        columns.fill(row, Request(str(row), [1, 2, 3], SamplingParams(temperature=0.7)), seed=row)
    columns.context[0], columns.new[:] = 2, (1, 3, 3, 3)
    batch, passes = Batch(columns, np.array([0]), np.array([1, 2, 3])), pipeline()
    passes.decide(batch, StepView())
    step = step_graph(lower(batch, 5))
    passes.run(step, "batch", every_kernel())
    model = build_model(small_model(), "bfloat16", ("decode",)).merged(build_sampler(9, STAGES))
    passes.run(model, "model", every_kernel())
    written = [step.text(tables=True), step.text(generic=True), model.text(), model.text(generic=True)]
    return [re.findall(r"\w+|\s+|.", text) for text in written]


GOOD = good_texts()


@examples(150)
@given(st.sampled_from(range(len(GOOD))), st.randoms(use_true_random=False), st.integers(1, 3))
def test_damaged_text_is_read_or_refused_in_one_line(which, random, times):
    tokens = list(GOOD[which])
    for _ in range(times):
        at, other = random.randrange(len(tokens)), random.randrange(len(tokens))
        match random.randrange(4):
            case 0:
                del tokens[at]
            case 1:
                tokens.insert(at, tokens[other])
            case 2:
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case 3:
                tokens = tokens[: max(1, at)]
    try:
        IRGraph.parse("".join(tokens), "damaged").verify()
    except UserError as error:
        assert "\n" not in str(error)
