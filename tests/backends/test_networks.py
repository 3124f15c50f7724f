"""The vendors' collectives are chosen by vendor, not by torch's name. gloo's are real, others' calls on a fake."""

from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from sagellm.backends import chips, networks
from sagellm.backends.chips import vendor
from sagellm.backends.comm import Gloo, open_store
from sagellm.backends.networks import NETWORKS, ProcessGroup, connect, find
from sagellm.errors import RankLost, UserError
from sagellm.ir.dialects import comm

RANKS = 4


def test_every_vendor_has_a_network_and_the_name_nccl_means_three():
    of = {name: find(vendor(name).network) for name in chips.NAMES}
    assert {name: network.name for name, network in of.items()} == {
        "ascend": "hccl", "cambricon": "cncl", "hygon": "rccl", "kunlun": "bkcl", "cuda": "nccl", "cpu": "gloo",
    }  # fmt: skip
    assert {name for name, network in of.items() if network.backend == "nccl"} == {"hygon", "kunlun", "cuda"}
    with pytest.raises(UserError, match="unknown network 'mpi'; accepted: gloo, nccl"):
        find("mpi")


REAL = """
import sys
import torch
from sagellm.backends.networks import NETWORKS, ProcessGroup
from sagellm.errors import UserError

port, rank = int(sys.argv[1]), int(sys.argv[2])
group = ProcessGroup(NETWORKS["gloo"], "cpu", port, rank, 2, seconds=60)
bring = lambda rank: torch.arange(24.).view(4, 6) * (rank + 1)
mine, both = bring(rank), [bring(0), bring(1)]
half = lambda x, dim: x.chunk(2, dim)[rank]
for _ in range(2):
    for dim in (0, 1):
        results = {
            "all_reduce": sum(both),
            "all_gather": torch.cat(both, dim),
            "reduce_scatter": half(sum(both), dim),
            "all_to_all": torch.cat([half(x, dim) for x in both], dim),
        }
        pending = {name: group.start(name, mine, dim) for name in results}
        for name, result in results.items():
            found = pending[name].wait()
            assert torch.equal(found, result) and found.is_contiguous(), (name, dim)
            assert torch.equal(mine, bring(rank))
        assert group.all_gather(mine[:0], 1).shape == (0, 12)
    group.send(mine, 1)
    assert torch.equal(group.recv(4, 6, torch.float32, 1), bring(1 - rank))
    try:
        ProcessGroup(NETWORKS["gloo"], "cpu", port, rank, 2)
    except UserError as error:
        assert "default group in this process" in str(error)
    else:
        raise AssertionError("a second default group")
assert group.group_name
group.close()
assert not torch.distributed.is_initialized()
"""


def test_between_two_processes_each_collective_has_its_meaning():
    store = open_store(2)
    with ThreadPoolExecutor(2) as pool:
        for rank in pool.map(lambda rank: forked.python(REAL, store.port, rank), range(2)):
            assert rank.returncode == 0, rank.stderr


class Calls(TorchDispatchMode):
    """The operations of torch.distributed, with the shapes that they are given."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            flat = torch.utils._pytree.tree_leaves(args)
            name = function._schema.name.removeprefix("c10d::")
            self.made.append((name, [tuple(x.shape) for x in flat if isinstance(x, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch):
    """`fake(network)`: rank 1 of four on a network that torch knows by its name, where nothing is sent."""

    def create(store, rank, size, timeout):
        return FakeProcessGroup._create_internal(rank, size)

    made = []

    def make(name, device="cpu"):
        network = NETWORKS[name]
        if network.backend == "nccl":  # torch's own; this build has none
            network = evolve(network, backend="fake")
        elif network.backend not in dist.Backend.backend_list:
            dist.Backend.register_backend(network.backend, create, devices=["cpu"])
        store = open_store(1)
        monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: store)
        made.append(ProcessGroup(network, device, store.port, 1, RANKS))
        return made[-1]

    yield make
    for group in made:
        group.close()


@pytest.mark.parametrize("name", ["hccl", "cncl", "nccl", "rccl", "bkcl"])
def test_a_vendors_network_gets_the_calls_of_each_collective(fake, name):
    group = fake(name)
    assert dist.get_backend() == group.network.backend
    x = torch.zeros(8, 12)
    with Calls() as calls:
        shapes = {
            "all_reduce": group.all_reduce(x).shape,
            "all_gather": group.all_gather(x, 1).shape,
            "reduce_scatter": group.reduce_scatter(x, 0).shape,
            "all_to_all": group.all_to_all(x, 0).shape,
        }
    assert shapes == {
        "all_reduce": (8, 12),
        "all_gather": (8, 48),
        "reduce_scatter": (2, 12),
        "all_to_all": (8, 12),
    }
    assert set(shapes) == set(comm.COLLECTIVES)
    assert calls.made == [
        ("allreduce_", [(8, 12)]),
        ("_allgather_base_", [(48, 8), (12, 8)]),
        ("_reduce_scatter_base_", [(2, 12), (8, 12)]),
        ("alltoall_base_", [(4, 2, 12), (4, 2, 12)]),
    ]


def test_a_send_leaves_with_the_receive_that_follows(fake):
    group = fake("hccl")
    with Calls() as calls:
        group.send(torch.zeros(3, 5), 1)
        assert not calls.made
        assert group.recv(3, 5, torch.float32, 1).shape == (3, 5)
    assert [name for name, _ in calls.made] == ["send", "recv_"]


def test_calls_that_fuse_a_collective_know_the_group_by_its_librarys_name(fake, monkeypatch):
    group = fake("hccl")
    named = type("Named", (), {"get_hccl_comm_name": lambda self, rank: f"group of {rank}"})
    monkeypatch.setattr(type(dist.group.WORLD), "_get_backend", lambda *_: named())
    assert group.group_name == "group of 1"


def test_a_group_that_is_left_makes_room_for_another(fake):
    fake("hccl").close()
    assert fake("cncl").group_name


def test_a_network_that_this_torch_lacks_is_named():
    with pytest.raises(UserError, match=r"network bkcl is not in torch .*accepted: .* 'nccl' .Kunlun's BKCL"):
        ProcessGroup(NETWORKS["bkcl"], "cuda", 1, 0, 2)


def test_settings_of_the_environment_that_the_library_cannot_read_are_refused(monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "200")
    NETWORKS["hccl"].check_settings()
    monkeypatch.setenv("HCCL_BUFFSIZE", "200M")
    with pytest.raises(UserError, match=r"HCCL_BUFFSIZE is '200M'; accepted: a whole number .MB of"):
        ProcessGroup(NETWORKS["hccl"], "npu", 1, 0, 2)


def test_a_rank_that_does_not_come_is_lost():
    store = open_store(2)
    with pytest.raises(RankLost, match="rank 0 cannot meet the others"):
        ProcessGroup(NETWORKS["gloo"], "cpu", store.port, 0, 2, seconds=0.5)
    assert not dist.is_initialized()


def test_each_rank_takes_the_device_of_its_number_and_the_cpu_keeps_gloo(monkeypatch):
    taken = []
    devices = type(
        "npu", (), {"device_count": staticmethod(lambda: 2), "set_device": staticmethod(taken.append)}
    )
    monkeypatch.setattr(torch, "npu", devices, raising=False)
    monkeypatch.setattr(networks, "import_module", lambda name: None)
    monkeypatch.setattr(networks, "ProcessGroup", lambda *args: args)
    assert connect(vendor("ascend"), 7, 1, 2) == (NETWORKS["hccl"], "npu", 7, 1, 2)
    assert taken == [1]
    with pytest.raises(
        UserError, match=r"tensor_parallel is 4; accepted: at most the 2 devices .*ASCEND_RT_VISIBLE"
    ):
        connect(vendor("ascend"), 7, 2, 4)
    store = open_store(1)
    assert isinstance(connect(vendor("cpu"), store.port, 0, 1), Gloo)
