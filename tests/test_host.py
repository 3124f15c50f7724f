"""A process in a container or a service takes what that gives it, not what the machine has."""

import os

import pytest

from sagellm.host import available_memory, processors

pytestmark = pytest.mark.contract
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    """Writes files of a machine that has 1,000 MiB free."""

    def write(**files):
        for name, text in {"proc/meminfo": "MemFree: 9 kB\nMemAvailable: 1024000 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def group(folder, limit, used, files=0):
    """Memory of a control group of version 2."""
    return {
        f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{folder}/memory.current": f"{used}\n",
        f"sys/fs/cgroup{folder}/memory.stat": f"anon 5\ninactive_file {files}\n",
    }


def test_without_limits_the_kernels_estimate_holds(machine):
    assert available_memory(machine()) == 1000 * MIB
    root = machine(**{"proc/self/cgroup": "0::/\n"}, **group("", "max", 7 * MIB))
    assert available_memory(root) == 1000 * MIB


def test_a_limit_leaves_what_is_not_used_and_pages_of_files(machine):
    root = machine(**{"proc/self/cgroup": "0::/a/b\n"}, **group("/a/b", 300 * MIB, 200 * MIB, 50 * MIB))
    assert available_memory(root) == 150 * MIB


def test_the_tightest_of_the_groups_around_counts(machine):
    inner, outer = group("/a/b", 800 * MIB, MIB), group("/a", 600 * MIB, 590 * MIB)
    assert available_memory(machine(**{"proc/self/cgroup": "0::/a/b\n"}, **inner, **outer)) == 10 * MIB


def test_more_used_than_the_limit_leaves_nothing(machine):
    assert available_memory(machine(**{"proc/self/cgroup": "0::/\n"}, **group("", MIB, 2 * MIB))) == 0


@pytest.mark.parametrize("path", ["/docker/1f", "/../../pods/1f"])
def test_a_path_from_outside_of_the_container_means_its_top(machine, path):
    root = machine(**{"proc/self/cgroup": f"0::{path}\n"}, **group("", 100 * MIB, 40 * MIB))
    assert available_memory(root) == 60 * MIB


def test_limits_of_version_1(machine):
    root = machine(
        **{
            "proc/self/cgroup": "5:devices:/x\n4:memory:/job\n1:cpu,cpuacct:/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{100 * MIB}",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{60 * MIB}",
            "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {20 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{800 * MIB}",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        }
    )
    assert available_memory(root) == 60 * MIB
    assert processors(root) == 1


@pytest.mark.parametrize("limit, count", [("max 100000", 4), ("100000 100000", 1), ("250000 100000", 3)])
def test_processors_are_those_that_time_is_given_for(machine, monkeypatch, limit, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    root = machine(**{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": limit})
    assert processors(root) == count


def test_this_machine_has_some_of_both():
    assert available_memory() > 0 and 1 <= processors() <= os.cpu_count()
