"""Work on several streams is ordered by events: where a wait is missing, that is seen without the chip."""

import json

import forked
import pytest

from sagellm.conformance.fake_cann.build import Unavailable, build
from sagellm.conformance.models import write_model
from sagellm.conformance.order import Order

COPIES = """
import json
import numpy as np, torch
from sagellm.backends.aten.cache import DeviceCache
from sagellm.conformance.fake_cann.load import fake_ascend
from sagellm.conformance.order import Order
from sagellm.schemas import KVCacheSchema

schema = KVCacheSchema(dtype="bfloat16", block_size=16, num_layers=2, num_kv_heads=2, head_dim=32)
some, slots, others = np.array([2, 5]), np.array([3, 0]), np.array([1, 3])

def wrong(between=lambda cache: None, after=lambda cache, room: None, begins=True):
    seen.device.follow()
    order = seen.order = Order()
    cache = DeviceCache(schema, 8, "npu")
    cache.beside.begin_step()
    room = torch.empty(4, 2, 2, 16, 2, 32, dtype=torch.bfloat16, pin_memory=True)
    assert room.is_pinned()
    cache.copy(others, some)  # an earlier step
    if begins:
        cache.beside.begin_step()
    cache.beside.copy(some, room, slots)
    cache.clear(others)  # the forward beside it
    between(cache)
    after(cache, room)
    assert order.streams > 1 and order.accesses > 5
    return bool(order.wrong)

def again(cache):
    cache.beside.begin_step()

def waits(cache):
    cache.beside.wait()

with fake_ascend() as seen, seen.device:
    found = {
        "right": wrong(),
        "before what was written": wrong(begins=False),
        "blocks go to others": wrong(again, lambda cache, room: cache.clear(some)),
        "blocks go to others in the same step": wrong(after=lambda cache, room: cache.clear(some)),
        "the host reads": wrong(waits, lambda cache, room: room[slots].sum()),
        "the host reads too early": wrong(again, lambda cache, room: room[slots].sum()),
        "the host reads what is not copied": wrong(again, lambda cache, room: room[[1, 2]].sum()),
        "copied again": wrong(again, lambda cache, room: cache.beside.copy(some, room, slots)),
    }
print(json.dumps(found))
"""
COLLECTIVES = """
import json, sys
import torch
from sagellm.backends.chips import vendor
from sagellm.backends.comm import Work, open_store
from sagellm.backends.networks import connect
from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.conformance.fake_cann.load import fake_ascend
from sagellm.engine.load import load_weights
from sagellm.engine.planner import Planner
from sagellm.models.checkpoint import Checkpoint
from sagellm.rows import build_rows

planner = Planner(EngineConfig(model=sys.argv[1], target="ascend", tensor_parallel=2, max_length=256))
planner.submit(Request("a", list(range(40)), SamplingParams(max_tokens=2)))
batch = planner.schedule()
planner.kv.pool.extend(planner.columns, batch.prefill)
rows = build_rows(batch)
program = planner.compiler.model(("prefill",), 16384).program  # of so many tokens that overlapping pays
begun = program.source.count("comm.start(")
store = open_store(2)

with fake_ascend(devices=2) as seen, seen.device, torch.inference_mode():
    comm = connect(vendor("ascend"), store.port, 0, 2)
    weights = load_weights(program, Checkpoint(planner.folder), planner.expected, rank=0, ranks=2, device="npu")
    cache = planner.backend.make_cache(planner.rank_schema, len(planner.kv.pool.references))

    def forward():
        torch.npu.synchronize()
        logits = program["model"](weights, cache, comm, planner.backend.upload(rows, 128)).cpu()
        wrong, seen.order.wrong[:] = bool(seen.order.wrong), []
        return wrong

    found = {"right": forward(), "begun": begun, "streams": seen.order.streams, "across": seen.order.across}
    wait, Work.wait = Work.wait, lambda self: self._finish()
    found["without waits"] = forward()
    Work.wait = wait
    found["with them again"] = forward()
    comm.close()
print(json.dumps(found))
"""


def run(code: str, *arguments: str) -> dict:
    """What it prints, in a process that has the fake CANN."""
    try:
        build()
    except Unavailable as reason:
        pytest.skip(str(reason))
    done = forked.python(code, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_copies_beside_the_forward_come_after_what_wrote_their_blocks_and_before_what_overwrites_them():
    assert run(COPIES) == {
        "right": False,
        "before what was written": True,
        "blocks go to others": False,
        "blocks go to others in the same step": True,
        "the host reads": False,
        "the host reads too early": True,
        "the host reads what is not copied": False,
        "copied again": False,
    }


def test_a_collective_that_nobody_waits_for_is_seen(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    found = run(COLLECTIVES, str(write_model(tmp_path / "qwen3", "qwen3", **wide)))
    assert found["begun"] > 2, "the emitted text begins collectives early"
    assert found["streams"] >= 2 and found["across"] > 10
    assert not found["right"] and found["without waits"] and not found["with them again"]


@pytest.mark.parametrize(
    ("between", "wrong"),
    [
        ([], True),
        (["record 1 7"], True),
        (["wait 2 7"], True),
        (["record 1 7", "wait 2 7"], False),
        (["wait 2 7", "record 1 7"], True),
        (["record 1 7", "wait 3 7", "record 3 8", "wait 2 8"], False),
        (["stream 1"], False),
        (["record 1 7", "event 7"], False),
        (["record 2 7", "event 7"], True),
        (["device"], False),
    ],
)
def test_what_orders_two_streams(between, wrong):
    order = Order()
    order.note("copy 1 1000 2000 64")
    for line in between:
        order.note(line)
    order.note("copy 2 2060 3000 64")
    assert bool(order.wrong) == wrong


def test_two_reads_and_other_bytes_need_no_order():
    order = Order()
    for line in ("copy 1 1000 2000 64", "copy 2 1000 3000 64", "copy 3 2064 4000 64"):
        order.note(line)
    assert not order.wrong
