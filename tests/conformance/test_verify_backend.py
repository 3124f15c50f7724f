"""Every vendor's backend passes the checks that need no chip, by the public command."""

import subprocess
import sys

import pytest

TARGETS = ["ascend", "ascend:310P"]


def verify(target: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sagellm", "verify-backend", target]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("target", TARGETS)
def test_all_families_pass_all_layers(target):
    done = verify(target)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert {line.split()[1] for line in lines} >= {"bind", "constraints", "numbers"}
    for kind in ("decode", "prefill", "decode+cascade", "decode+tree", "prefill+shared"):
        assert kind in lines[0]


def test_a_backend_without_vendor_calls_is_refused():
    done = verify("cpu")
    assert done.returncode == 2
    assert done.stderr == (
        "sagellm verify-backend: error: backend 'cpu' makes no vendor calls; accepted: one that has a contract\n"
    )
