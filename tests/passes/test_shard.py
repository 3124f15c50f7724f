"""A model that is divided among ranks computes what it computed whole: every rank's graph evaluated, in lockstep."""

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from strategies import OverlapAlways, every_kernel, examples, model_configs, small_model, with_passes

from sagellm.errors import UserError
from sagellm.ir.dialects import comm, nn
from sagellm.ir.reference import evaluate_weights
from sagellm.ir.reference.ranks import on_ranks
from sagellm.meaning.check import MeaningChanged, check_model_passes
from sagellm.meaning.inputs import random_tensors, small_rows
from sagellm.models.decoder import build_model
from sagellm.passes import PARALLEL, pipeline
from sagellm.passes.driver import Pass, rewrites
from sagellm.passes.shard import weight_bytes
from sagellm.topology import TOPOLOGIES

PIPELINES = [
    with_passes(PARALLEL),
    with_passes("shard,kernel-fusion", OverlapAlways()),
    with_passes("shard", OverlapAlways(network_first=True), *pipeline("cleanup").passes),
]


def on(ranks, **fields):
    return evolve(every_kernel(), ranks=ranks, **fields)


@st.composite
def divisible(draw) -> tuple:
    """(ranks, model): one that these ranks can share, each KV head held by one of them or by several."""
    ranks = draw(st.sampled_from([2, 3, 4]))
    config = draw(model_configs())
    kv_heads = draw(st.sampled_from([1, ranks, 2 * ranks] + [2] * (ranks == 4)))
    heads = max(kv_heads, ranks) * draw(st.integers(1, 2))
    changed = evolve(
        config,
        num_kv_heads=kv_heads,
        num_heads=heads,
        vocab_size=ranks * draw(st.integers(2, 4)),
        intermediate_size=ranks * draw(st.integers(1, 3)),
    )
    return ranks, changed


@examples(16)
@given(divisible(), st.sampled_from(PIPELINES), st.integers(0, 99))
def test_ranks_compute_what_one_computes(shared, chosen, seed):
    ranks, config = shared
    graph = build_model(config, "float32", ("decode", "prefill"))
    check_model_passes(graph, chosen, on(ranks), rows=small_rows(graph, seed))


def applied(chosen, context, **fields):
    graph = build_model(small_model(vocab_size=8, **fields), "float32", ("prefill",))
    chosen.run(graph, "model", context, "full")
    return graph


def test_overlap_is_tried_by_these_tests():
    """The pipelines above do begin collectives early and cut tokens in two, in layers, embedding and head."""
    graph = applied(PIPELINES[1], on(2))
    assert graph.count(comm.Start) == 2 * 4 + 2 + 1
    assert graph.count(nn.SplitRows) and not graph.count(comm.AllReduce)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_its_part_and_norms_whole(ranks):
    """Exactly: matrices and their biases in parts, a KV head for each rank at least, the rest on every rank."""
    fields = {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 8, "qkv_bias": True, "o_bias": True}
    whole = applied(with_passes(""), on(1), **fields)
    context = on(ranks)
    divided = applied(with_passes("shard"), context, **fields)
    kv_parts = min(ranks, 2)
    layer = 4 * (16 * 8 // ranks + 2 * 8 * 8 // kv_parts + 8 * 16 // ranks + 3 * 8 * 8 // ranks)
    layer += 4 * (16 // ranks + 2 * 8 // kv_parts + 8 + 2 * 8)
    ends = 4 * (2 * 8 * 8 // ranks + 8 + 64 * 4)
    assert weight_bytes(divided) == 2 * layer + ends
    said = (
        f"each of {ranks} ranks holds {weight_bytes(divided):,} of {weight_bytes(whole):,} bytes of weights"
    )
    assert said in context.remarks[-1].message
    read = random_tensors(divided)
    for rank in range(ranks):
        stored = evaluate_weights(divided, read, rank=rank, ranks=ranks)
        held = sum(t.nbytes for layers in stored.values() for one in layers for t in one.values())
        assert held == weight_bytes(divided)


@pytest.mark.parametrize(
    ("ranks", "fields", "message"),
    [
        (2, {"vocab_size": 7}, "%x = nn.embedding .* has 7 rows of the vocabulary for 2 ranks; .* divides 7"),
        (4, {"num_heads": 6, "num_kv_heads": 2}, "%q = nn.linear .* has 6 heads for 4 ranks; .* divides 6"),
        (
            4,
            {"num_heads": 12, "num_kv_heads": 6},
            "%k = nn.linear .* has 6 KV heads for 4 ranks; .* divides 6 or is a multiple of it",
        ),
        (4, {"num_heads": 4, "intermediate_size": 6}, "%gate = nn.linear .* has 6 columns for 4 ranks"),
    ],
)
def test_sizes_that_cannot_be_divided_are_one_clear_error(ranks, fields, message):
    graph = build_model(small_model(**{"vocab_size": 8, **fields}), "float32", ("prefill",))
    with pytest.raises(UserError, match=f"^shard: {message}") as error:
        pipeline("shard").run(graph, "model", on(ranks))
    assert "\n" not in str(error.value)


def test_a_second_division_declines():
    context = on(2)
    graph = applied(with_passes("shard,shard"), context)
    assert graph.ranks == 2
    assert "divided among 2 ranks already" in context.remarks[-1].message


# divisions that are wrong are caught


class ForgetsASum(Pass):
    name = "forgets-a-sum"
    graph = "model"

    @rewrites(comm.AllReduce)
    def forget(self, op, graph, context):
        op.result.replace_all_uses_with(op.x)
        op.detach()


class AddsTheBiasOnEveryRank(Pass):
    name = "adds-the-bias-on-every-rank"
    graph = "model"

    def apply(self, graph, context):
        for op in graph.walk():
            op.properties.pop("once", None)


@pytest.mark.parametrize("wrong", [ForgetsASum, AddsTheBiasOnEveryRank])
def test_a_wrong_division_is_caught(wrong):
    graph = build_model(small_model(vocab_size=8, o_bias=True), "float32", ("decode", "prefill"))
    chosen = with_passes("shard", wrong())
    with pytest.raises((MeaningChanged, UserError), match=r"different logits|changed"):
        check_model_passes(graph, chosen, on(2, topology=TOPOLOGIES["hccs"]))


def test_ranks_that_do_not_meet_are_an_error():
    def work(rank, exchange):
        for _ in range(2 - rank):
            exchange("tp", torch.zeros(1))
        if rank == 1:
            raise UserError("rank 1 has had enough")

    with pytest.raises(UserError, match="rank 1 has had enough"):
        on_ranks(2, work)
