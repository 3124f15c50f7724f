"""What kernel-fusion joins beside the operations of a model: quantised norms, sums over ranks, filters of logits."""

from inspect import signature
from types import SimpleNamespace

import numpy as np
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, every_kernel, examples

from sagellm import backends
from sagellm.batch import Stage
from sagellm.conformance.operations import Lockstep
from sagellm.ir.attrs import tensor
from sagellm.ir.build import Body
from sagellm.ir.dialects import comm, nn
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import stage_words
from sagellm.ir.reference.evaluate import evaluate_function
from sagellm.ir.reference.ranks import on_ranks
from sagellm.ir.reference.values import How
from sagellm.models.decoder import build_sampler
from sagellm.passes import pipeline
from sagellm.passes.driver import PassContext

WIDTH, RANKS = 8, 2
FUSED = ("nn.add_rms_norm", "nn.rms_norm_quantize", "nn.add_rms_norm_quantize", "comm.linear_all_reduce")
STEPS = ("add", "norm", "heads", "product", "biased", "sum", "quantize", "quantize")


@st.composite
def functions(draw) -> IRGraph:
    """Any such operations one behind the other, each on any values that there are; any of these are returned."""
    wide, values, scales = (
        tensor("float32", None, WIDTH),
        tensor("int8", None, WIDTH),
        tensor("float32", None),
    )
    body = Body({"x": wide, "y": wide})
    floats, quantized = list(body.arguments()), []
    recent = st.integers(1, 3).map(lambda back: floats[max(0, len(floats) - back)])
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=9)):
        x, eps = draw(recent), draw(st.sampled_from([1e-6, 1e-2]))
        match step:
            case "add":
                made = body(nn.Add, [x, draw(recent)], wide)
            case "norm":
                made = body(nn.RmsNorm, [x], wide, weight="norm", eps=eps)
            case "heads":
                made = body(nn.RmsNorm, [x], wide, weight="head_norm", eps=eps, heads=2)
            case "product":
                made = body(nn.Linear, [x], wide, weight="proj")
            case "biased":
                made = body(nn.Linear, [x], wide, weight="proj", bias="bias")
            case "sum":
                made = body(comm.AllReduce, [x], wide, group="tp")
            case "quantize":
                quantized += body(nn.Quantize, [x], values, scales)
                continue
        floats.append(made)
    returned = [value for value in floats[2:-1] if draw(st.integers(0, 3)) == 0]
    graph = IRGraph()
    graph.add(body.function("f", [*returned, floats[-1], *quantized]))
    return graph


def weights_of(rank: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(rank)
    shapes = {"norm": (WIDTH,), "head_norm": (WIDTH // 2,), "proj": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def inputs(seed: int) -> list[torch.Tensor]:
    return [torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)]


@examples(60)
@given(functions(), st.sets(st.sampled_from(FUSED), max_size=2), st.integers(0, 99))
def test_any_row_of_them_gives_what_it_gave_on_every_rank(graph, missing, seed):
    context = every_kernel()
    kernels = context.capability.kernels - missing
    context = evolve(context, capability=evolve(context.capability, kernels=kernels))
    fused = graph.clone()
    pipeline("kernel-fusion").run(fused, "model", context, "full")
    assert not missing & {op.name for op in fused.walk()}

    def results(of: IRGraph):
        def on_rank(rank, exchange):
            return evaluate_function(of, "f", inputs(seed), {"f": [weights_of(rank)]}, exchange=exchange)

        return on_ranks(RANKS, on_rank)

    for before, after in zip(results(graph), results(fused)):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@examples(20)
@given(functions(), st.integers(0, 99))
def test_the_cpu_computes_what_they_mean_fused_or_not(graph, seed):
    cpu = backends.load("cpu")
    fused = graph.clone()
    pipeline("kernel-fusion").run(fused, "model", PassContext(cpu.capability), "full")
    assert not fused.count(comm.LinearAllReduce)
    weights = weights_of(0)
    expected = evaluate_function(graph, "f", inputs(seed), {"f": [weights]})
    for of in (graph, fused):
        function = cpu.emit(of, "f")["f"]
        own = {"w": SimpleNamespace(**weights), "comm": Lockstep(0, lambda group, x: (0, [x]))}
        done = function(*(own[name] for name in signature(function).parameters if name in own), *inputs(seed))
        for one, other in zip(done if isinstance(done, tuple) else (done,), expected, strict=True):
            if one.dtype == torch.int8:
                assert (one.int() - other.int()).abs().max() <= 1
            else:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@examples(40)
@given(batches())
def test_a_sampler_chooses_what_it_chose(batch):
    rows = tuple(np.concatenate([batch.decode, batch.prefill]).tolist())
    stages = Stage(int(np.bitwise_or.reduce(batch.columns.stages[list(rows)])))
    graph = build_sampler(5, stage_words(stages))
    fused = graph.clone()
    context = every_kernel()
    pipeline("kernel-fusion").run(fused, "model", context, "full")
    assert fused.count(nn.TopKTopP) == (Stage.TOP_K in stages and Stage.TOP_P in stages)
    logits = torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(len(rows)))
    one, other = (
        evaluate_function(of, "sample", [logits, How(rows, batch.columns)], {})[0] for of in (graph, fused)
    )
    assert one.tolist() == other.tolist()


def test_quantised_tokens_are_within_half_a_step():
    body = Body({"x": tensor("bfloat16", None, 4)})
    made = body(nn.Quantize, body.arguments(), tensor("int8", None, 4), tensor("float32", None))
    graph = IRGraph()
    graph.add(body.function("f", made))
    x = torch.tensor([[1, -2, 0.25, 0.013], [0, 0, 0, 0], [3e38, -3e38, 1, 0], [9e-41, -3e-41, 0, 0]])
    x = x.bfloat16()
    for values, scales in (
        evaluate_function(graph, "f", [x], {}),
        backends.load("cpu").emit(graph, "f")["f"](x),
    ):
        assert values.dtype == torch.int8 and scales.dtype == torch.float32
        assert values[0].tolist() == [64, -127, 16, 1]
        assert values[1].tolist() == [0] * 4 and scales[1] == 0
        assert ((values * scales[:, None]) - x.float()).abs().le(scales[:, None] * 0.501)[:3].all()
        assert values.int().abs().max() <= 127
