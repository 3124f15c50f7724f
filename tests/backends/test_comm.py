"""gloo's collectives have the meaning that the reference gives them, and programs that overlap run on them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from strategies import OverlapAlways, small_model, with_passes

from sagellm.backends.comm import Gloo, open_store
from sagellm.backends.cpu import CpuBackend
from sagellm.batch import Batch, Columns, Request
from sagellm.compiler import expected_tensors
from sagellm.errors import RankLost
from sagellm.ir.attrs import tensor
from sagellm.ir.build import properties
from sagellm.ir.dialects import comm
from sagellm.ir.reference import MEANINGS
from sagellm.ir.reference.ranks import on_ranks
from sagellm.ir.reference.values import ModelScope
from sagellm.meaning.inputs import random_tensors
from sagellm.models.config import RopeConfig
from sagellm.models.decoder import build_model
from sagellm.passes.driver import PassContext
from sagellm.rows import build_rows
from sagellm.runtime.pool import BlockPool
from sagellm.schemas import KVCacheSchema

RANKS = 2


@pytest.fixture(scope="module")
def together():
    """`together(work)`: work(gloo) of every rank, each in a thread of this process."""
    store = open_store(RANKS)
    with ThreadPoolExecutor(RANKS) as pool:
        ranks = list(pool.map(lambda rank: Gloo(store.port, rank, RANKS, seconds=30), range(RANKS)))
        yield lambda work: list(pool.map(work, ranks))


def bring(rank, dtype=torch.float32, rows=4):
    """What a rank brings: whole numbers, whose sums are exact in every dtype."""
    made = torch.Generator().manual_seed(rank)
    return torch.randint(-9, 9, (rows, 6), generator=made).to(dtype)


def meaning(kind, **values):
    """The reference's result on each rank."""
    op = kind.create(
        result_types=[tensor("float32", None, 6)], properties=properties({"group": "tp", **values})
    )

    def work(rank, exchange):
        return MEANINGS[op.name](ModelScope({}, None, {}, None, exchange=exchange), op, bring(rank))

    return on_ranks(RANKS, work)


@pytest.mark.contract
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", comm.COLLECTIVES)
def test_a_collective_has_its_meaning_and_leaves_its_input_alone(together, name, dim, dtype):
    given = {} if name == "all_reduce" else {"dim": dim}
    expected = meaning(comm.COLLECTIVES[name], **given)

    def work(gloo):
        x = bring(gloo.rank, dtype)
        found = getattr(gloo, name)(x, **given), gloo.start(name, x, **given).wait()
        assert torch.equal(x, bring(gloo.rank, dtype))
        return found

    for rank, results in enumerate(together(work)):
        for result in results:
            assert torch.equal(result, expected[rank].to(dtype))


@pytest.mark.contract
def test_tensors_without_rows_need_no_network(together):
    for found in together(lambda gloo: gloo.all_gather(bring(gloo.rank, rows=0), dim=1)):
        assert found.shape == (0, 12)


@pytest.mark.contract
def test_neighbours_pass_their_tensors_around_the_end(together):
    def work(gloo):
        gloo.send(bring(gloo.rank), 1)
        return gloo.recv(4, 6, torch.float32, 1)

    for rank, found in enumerate(together(work)):
        assert torch.equal(found, bring((rank - 1) % RANKS))


def test_the_meaning_of_neighbours_is_the_same():
    given = {"group": "tp", "shift": 1}
    send = comm.Send.create(properties=properties(given))
    recv = comm.Recv.create(result_types=[tensor("float32", None, 6)], properties=properties(given))

    def work(rank, exchange):
        scope = ModelScope({}, None, {}, None, exchange=exchange)
        MEANINGS["comm.send"](scope, send, bring(rank))
        return MEANINGS["comm.recv"](scope, recv, bring(rank))

    for rank, found in enumerate(on_ranks(RANKS, work)):
        assert torch.equal(found, bring((rank - 1) % RANKS))


@pytest.mark.contract
def test_a_rank_that_does_not_come_is_lost():
    store = open_store(RANKS)
    with pytest.raises(RankLost, match="rank 0 cannot meet the others"):
        Gloo(store.port, 0, RANKS, seconds=0.5)


@pytest.mark.parametrize("network_first", [False, True])
def test_an_overlapped_program_computes_what_one_rank_does(together, network_first):
    """Emitted, with starts, waits and halves, on two threads with a cache each."""
    config = small_model(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=RopeConfig(rotary_dim=8, original_max_positions=64),
    )
    backend = CpuBackend()
    whole = build_model(config, "float32", ("prefill",))
    read = random_tensors(whole)
    rows = prompts()
    expected = run(backend, whole.clone(), read, rows)
    found = together(lambda gloo: run(backend, whole.clone(), read, rows, gloo, OverlapAlways(network_first)))
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def prompts():
    columns = Columns(3, 32, 4)
    for row, text in enumerate(([1, 2, 3, 4, 5, 6, 7], [8, 9], [3, 3, 3, 12, 15])):
        columns.fill(row, Request(str(row), text))
    columns.new[:] = columns.length
    batch = Batch(columns, np.zeros(0, np.int64), np.arange(3))
    BlockPool(32).extend(columns, batch.prefill)
    return build_rows(batch, shared=False)


def run(backend, graph, read, rows, gloo=None, *more):
    """Logits of a rank; without gloo, of the only one."""
    ranks, rank = (1, 0) if gloo is None else (gloo.size, gloo.rank)
    chosen = with_passes("shard,kernel-fusion,pack-weights", *more)
    chosen.run(graph, "model", PassContext(backend.capability, ranks=ranks))
    program = backend.emit(graph, f"rank {rank}")

    def part(name, dtype, dim=0, parts=1, once=False):
        found = read(name).to(dtype)
        return torch.zeros_like(found) if once and rank else found.chunk(parts, dim)[rank * parts // ranks]

    schema = KVCacheSchema(
        dtype="float32", block_size=4, num_layers=2, num_kv_heads=graph.kv_heads, head_dim=8
    )
    with torch.inference_mode():
        assert expected_tensors(graph)
        weights, cache = program["load"](part), backend.make_cache(schema, 32)
        network = () if gloo is None else (gloo,)
        return program["model"](weights, cache, *network, backend.upload(rows, 4))
