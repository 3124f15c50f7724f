"""Every vendor's backend passes the checks that need no chip, by the public command."""

import os

import forked
import pytest
from strategies import EXAMPLES

from sagellm import backends
from sagellm.cli import capture
from sagellm.conformance.models import write_model

LONG = pytest.mark.skipif(EXAMPLES not in os.environ, reason="the program is 910B's; in make test-long")
STOCK = pytest.mark.skipif(EXAMPLES not in os.environ, reason="the program is cuda's; in make test-long")
TINY = {"num_hidden_layers": 1, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64}
TARGETS = [
    ("ascend", None),
    ("ascend:310P", "qwen3"),
    ("ascend:950", "qwen3"),
    pytest.param("ascend:910C", "qwen3", marks=LONG),
    ("mlu", "qwen3"),
    ("dcu+kernels", "qwen3"),
    ("xpu+kernels", "qwen3"),
    ("cuda", "qwen3"),
    pytest.param("dcu", "qwen3", marks=STOCK),
    pytest.param("xpu", "qwen3", marks=STOCK),
]
"""And the family of the model: all, or one where the program differs little."""


@pytest.mark.parametrize(("target", "family"), TARGETS)
def test_what_is_emitted_passes_all_layers(target, family, tmp_path):
    model = ["--model", str(write_model(tmp_path / family, family, **TINY))] if family else []
    done = forked.sagellm("verify-backend", target, *model, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Warning")]
    assert all(line.startswith("ok ") for line in lines)
    if "int8" in backends.load(target).capability.kv_dtypes:
        assert any("int8 KV cache" in line for line in lines)
    contract = backends.load(target).contract
    layers = {"bind", "numbers"} | ({"constraints"} if contract.calls else set())
    assert {line.split()[1] for line in lines} >= layers | (
        {"trace", "order"} if contract.host_code else set()
    )
    if target.startswith("ascend"):
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


BROKEN = """
import sys
from sagellm.conformance import verify
from sagellm.backends.ascend import codegen
from sagellm.backends.aten import codegen as aten

short = aten.template("torch.ops.npu.npu_add_rms_norm({0}, {1}, {w}[:3], epsilon=1e-5)[::2]")
for table in (value for name, value in vars(codegen).items() if name.startswith("KERNELS")):
    table["nn.add_rms_norm"] = short
raise SystemExit(verify.main("stand_in", "ascend", sys.argv[1]))
"""


def test_a_broken_rule_is_the_first_line(tmp_path):
    folder = write_model(tmp_path / "qwen3", "qwen3", **TINY)
    done = forked.python(BROKEN, folder)
    assert done.returncode == 1, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("FAIL constraints") and "npu_add_rms_norm" in first, done.stdout
