"""Ascend devices are found, and HCCL is called, through the real torch_npu's host code over the fake CANN."""

import forked
import pytest

from sagellm.conformance.fake_cann.build import Unavailable, build

CODE = """
import sys
from sagellm.conformance.fake_cann.load import load
load(sys.argv[1], devices=2)
import torch
from sagellm.backends import best, devices, load as backend
from sagellm.backends.base import require_device
from sagellm.backends.chips import vendor
from sagellm.backends.comm import open_store
from sagellm.backends.networks import connect

ascend = vendor("ascend")
found = devices.probe(ascend).devices
print(*(device.chip.name for device in found), best())
require_device(backend("auto"))
assert all(device.memory for device in found) and devices.free_memory(ascend)
assert torch.npu.get_device_capability() is None
assert ("bfloat16" in found[0].chip.dtypes.value) == torch.npu.is_bf16_supported()
assert [v.name for v in devices.vendors() if devices.probe(v).found] == ["ascend", "cpu"]

store = open_store(1)
group = connect(ascend, store.port, 0, 1)
assert torch.distributed.get_backend() == "hccl" and group.group_name
x = torch.ones(4, 6, device="npu", dtype=torch.float16)
for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
    result = group.start(name, x, 0).wait()
    assert result.shape == x.shape and result.device.type == "npu", name
group.close()
"""
CHIP = "310P"
"""The one of those that the fake CANN knows which differs most. Each would cost a process that imports torch_npu."""


def test_the_vendors_host_code_says_which_chip_it_is_and_takes_the_calls_of_collectives():
    try:
        build()
    except Unavailable as reason:
        pytest.skip(str(reason))
    done = forked.python(CODE, CHIP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == [CHIP, CHIP, f"ascend:{CHIP}"]
