"""What overlapping is predicted to do, and that it never loses by its own prediction."""

from itertools import pairwise

import networkx
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_kernel, examples, small_model

from sagellm.ir.dialects import comm
from sagellm.ir.edit import only_block, operations
from sagellm.ir.graph import dependences
from sagellm.ir.timeline import COMPUTE, NETWORK, Machine, list_schedule, predict, seconds, simulate, total
from sagellm.models.decoder import build_model
from sagellm.passes import pipeline
from sagellm.passes.comm_compute_overlap import MARGIN, begin_early, halve
from sagellm.topology import TOPOLOGIES, Topology

PASS = "comm-compute-overlap"


def model(hidden=1024, heads=16, layers=2):
    config = small_model(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        num_layers=layers,
        windows=(None,) * layers,
    )
    return build_model(config, "bfloat16", ("prefill",))


MODELS = {hidden: model(hidden) for hidden in (256, 4096)}


def figure(low, high):
    return st.floats(low, high).map(lambda value: evolve(TOPOLOGIES["hccs"].latency, value=value))


TOPOLOGY = st.builds(
    Topology,
    name=st.just("any"),
    wiring=st.sampled_from(["mesh", "ring"]),
    bandwidth=figure(1e8, 1e12),
    latency=figure(0, 1e-3),
    slowdown=figure(1, 3),
    costs=st.sampled_from([None, TOPOLOGIES["hccs"].costs, TOPOLOGIES["pcie"].costs]),
)


@examples(16)
@given(
    st.sampled_from([*MODELS]), TOPOLOGY, st.sampled_from([2, 4, 8]), st.integers(0, 14).map(lambda n: 2**n)
)
def test_no_step_is_predicted_to_be_slower_with_it(hidden, topology, ranks, tokens):
    """For any network, and for all numbers of tokens that the graph is made for (its ends and a few between)."""
    context = evolve(every_kernel(), ranks=ranks, tokens=tokens, topology=topology)
    without = MODELS[hidden].clone()
    pipeline("shard,kernel-fusion").run(without, "model", context)
    with_ = without.clone()
    pipeline(PASS).run(with_, "model", context)
    changed = any(r.done and r.pass_name == PASS for r in context.remarks)
    for n in sorted({tokens // 2 + 1, tokens}):
        machine = Machine.of(context.costs, topology, ranks, n, 1)
        before, after = (total(predict(graph, machine)) for graph in (without, with_))
        assert (after < before) if changed else (after == before)


@pytest.mark.parametrize("name", ["hccs", "pcie"])
def test_it_declines_for_tiny_messages_and_applies_to_large_ones(name):
    for tokens, expected in ((1, False), (16, False), (8192, True)):
        context = evolve(every_kernel(), ranks=2, tokens=tokens, topology=TOPOLOGIES[name])
        pipeline(f"shard,kernel-fusion,{PASS}").run(MODELS[4096].clone(), "model", context)
        (said,) = (r for r in context.remarks if r.pass_name == PASS and "@layers" in r.where)
        assert said.done is expected and f"{tokens} tokens, 2 x " in said.message
        assert said.predicted is not None
        assert said.predicted > 0 if expected else said.predicted <= 0


def layer(topology="hccs", tokens=4096):
    context = evolve(every_kernel(), ranks=2, topology=TOPOLOGIES[topology])
    graph = MODELS[4096].clone()
    pipeline("shard,kernel-fusion").run(graph, "model", context)
    machine = Machine.of(context.costs, context.topology, 2, tokens)
    return only_block(graph.functions["layers.dense"]), machine


@examples(20)
@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(TOPOLOGIES.keys() - {"mlu-link"})),
    st.integers(2, 9000),
)
def test_an_order_keeps_all_dependences(halves, network_first, topology, tokens):
    block, machine = layer(topology, tokens)
    if halves:
        halve(block)
    begin_early(block)
    order = list_schedule(block, machine, network_first=network_first)
    place = {op: at for at, op in enumerate(order)}
    graph = dependences(block)
    assert len(place) == len(graph) == len(order)
    assert all(place[one.op] < place[other.op] for one, other in graph.edges())
    assert networkx.is_directed_acyclic_graph(graph)


def test_lanes_do_one_thing_at_a_time_and_a_wait_comes_after_its_collective():
    block, machine = layer()
    halve(block)
    begin_early(block)
    spans = simulate(block, machine)
    for lane in (COMPUTE, NETWORK):
        mine = sorted((s.start, s.end) for s in spans if s.lane == lane)
        assert all(one[1] <= other[0] + 1e-12 for one, other in pairwise(mine))
    assert sum(s.lane == NETWORK for s in spans) == 4


def test_what_the_network_does_beside_it_slows_computing_down():
    block, machine = layer()
    begin_early(block)
    slow = evolve(
        machine, topology=evolve(machine.topology, slowdown=evolve(machine.topology.slowdown, value=3.0))
    )
    assert seconds(simulate(block, slow)) >= seconds(simulate(block, machine))


def test_halves_have_all_tokens_between_them():
    block, machine = layer(tokens=4097)
    halve(block)
    rows = machine.rows(block)
    halves = [rows[op.result] for op in operations(block) if isinstance(op, comm.LinearAllReduce)]
    assert halves == [2049, 2048, 2049, 2048]
    assert 0 < MARGIN < 0.1
