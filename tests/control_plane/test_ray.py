"""Engines through Ray, on a cluster of this machine alone."""

import os

import pytest
from planes import run

from sagellm.control_plane import ray_launch
from sagellm.control_plane.client import AsyncInferenceClient
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.errors import UserError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def launcher():
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    made = ray_launch.RayLauncher("local")
    yield made
    ray.shutdown()


def test_an_engine_of_the_cluster_is_started_answers_and_ends(launcher, tmp_path):
    async def main():
        manager = ControlPlaneManager(launcher=launcher, logs=tmp_path, probe_every=0.1)
        async with await AsyncInferenceClient.create(manager=manager) as client:
            extra = ("--core", "inline", "--max-length", "128")
            info = await manager.request_engine_startup("builtin", device="cpu", extra=extra)
            await manager.wait_until_ready(info.engine_id, 300)
            assert info.host == ray.util.get_node_ip_address()
            answer = await client.chat("Hello", max_tokens=4)
            assert answer["choices"][0]["message"]["role"] == "assistant"
            assert any("ready" in line for line in await manager.engine_log(info.engine_id))
            pid = info.metadata["pid"]
            await manager.request_engine_shutdown(info.engine_id, 5)
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run(main(), 400)


def test_a_cluster_without_the_device_says_what_it_has(launcher, monkeypatch):
    monkeypatch.setattr(ray_launch, "PLACE_SECONDS", 1.0)
    manager = ControlPlaneManager(launcher=launcher)
    with pytest.raises(UserError, match=r"no machine of the cluster has .*NPU.* free; it has: CPU"):
        run(manager.request_engine_startup("builtin", device="ascend"))


@pytest.mark.parametrize(
    "device, ranks, wanted",
    [
        ("ascend:910B", 8, {"num_cpus": 1, "resources": {"NPU": 8}}),
        ("dcu+kernels", 2, {"num_cpus": 1, "num_gpus": 2}),
        ("mlu", 1, {"num_cpus": 1, "resources": {"MLU": 1}}),
        (None, 2, {"num_cpus": 2}),
    ],
)
def test_devices_are_resources_of_the_cluster(device, ranks, wanted):
    assert ray_launch.needs(device, ranks) == wanted
