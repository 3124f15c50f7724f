"""Every vendor's backend passes the checks that need no chip, by the public command."""

import os
import subprocess
import sys

import pytest
from strategies import EXAMPLES

from sagellm.cli import capture
from sagellm.conformance.models import write_model

LONG = pytest.mark.skipif(EXAMPLES not in os.environ, reason="the program is 910B's; in make test-long")
TARGETS = [
    ("ascend", None),
    ("ascend:310P", "qwen3"),
    ("ascend:950", "qwen3"),
    pytest.param("ascend:910C", "qwen3", marks=LONG),
]
"""And the family of the model: all, or one where the program differs little."""


def verify(target: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sagellm", "verify-backend", target, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(("target", "family"), TARGETS)
def test_what_is_emitted_passes_all_layers(target, family, tmp_path):
    model = ["--model", str(write_model(tmp_path / family, family))] if family else []
    done = verify(target, *model)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Warning")]
    assert all(line.startswith("ok ") for line in lines)
    assert {line.split()[1] for line in lines} >= {"bind", "constraints", "numbers", "trace"}
    assert any(line.split()[1:3] == ["numbers", "operations"] for line in lines)
    print(*(line for line in lines if "NOT CHECKED" in line))
    for kind in ("decode", "prefill", "decode+cascade", "decode+tree", "prefill+shared"):
        assert kind in lines[0]


def test_a_backend_without_vendor_calls_is_refused():
    done = capture(["verify-backend", "cpu"])
    assert done.code == 2
    assert done.stderr == (
        "sagellm verify-backend: error: backend 'cpu' makes no vendor calls; accepted: one that has a contract\n"
    )
