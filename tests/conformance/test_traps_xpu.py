"""Mistakes that kunlun_ops would let pass are noticed without the chip."""

import pytest
from spring import sprung

ADD = r"output=(\w+), eps=(\S+),\n(\s+)residual_output=(\w+)\)"
QUANTISED = """
weight, x = torch.randn(48, 32).mul_(3), torch.randn(5, 32)
largest = weight.abs().amax(-1)
weight_q = (weight * 127 / largest[:, None]).round().to(torch.int8)
x_q, of_x = torch.empty(5, 32, dtype=torch.int8), torch.empty(5, 1)
torch.ops._C.quant2d(x, x_q, of_x)
out = torch.ops._C.matmul(x_q, {weight}, torch.float32, x_pc_max=of_x, w_pc_max=largest{scale})
far = (out - x @ weight.t()).abs().max() / (x @ weight.t()).abs().max()
found = "nobody" if far < 0.03 else "numbers"
"""
TRAPS = {
    "nothing": ({"cpu": True}, "nobody"),
    "nothing, behind a window": ({"cpu": True, "family": "mistral-window"}, "nobody"),
    "heads of 48": ({"cpu": True, "family": "llama-head-48"}, "refused"),
    "eps before output": (
        {"edits": [(r"(_C\.rmsnorm\(.*), (\S+), (\S+)\)", r"\1, \3, \2)")]}, "error",
    ),
    "input before output": (
        {"edits": [(r"_C\.silu_and_mul\((\w+), (\w+)\)", r"_C.silu_and_mul(\2, \1)")]}, "constraints",
    ),
    "the softmax's scale as alpha": ({"edits": [(r" \* 32 \*\* 0\.5", "")]}, "numbers"),
    "alpha as the softmax's scale": ({"edits": [(r"scale=([\d.]+)", r"scale=\1 * 32 ** 0.5")]}, "numbers"),
    "largest values as scales": ({"code": QUANTISED.format(weight="weight_q", scale="")}, "nobody"),
    "a 127th of them as scales": ({"code": QUANTISED.format(weight="weight_q", scale=" / 127")}, "numbers"),
    "quantised weight as [in, out]": ({"code": QUANTISED.format(weight="weight_q.t()", scale="")}, "constraints"),
    "lengths on the host that differ": (
        {"edits": [(r"rows\.prompts\.key_offsets_host", "rows.prompts.query_offsets_host")]}, "constraints",
    ),
    "no lengths on the host": (
        {"edits": [(r"context_lens_cpu=rows\.decodes\.lengths_host", "context_lens_cpu=None")]}, "constraints",
    ),
    "no lengths on the device": (
        {"edits": [(r"context_lens_xpu=rows\.decodes\.lengths", "context_lens_xpu=None")]}, "constraints",
    ),
    "lengths that are not cumulative": (
        {"edits": [(r"rows\.prompts\.key_offsets", "rows.prompts.lengths")]}, "constraints",
    ),
    "sin before cos": ({"edits": [(r"32, angles, True", "32, angles.roll(16, -1), True")]}, "numbers"),
    "rotation taken for functional": (
        {"edits": [(r"rotary_embedding\(rows\.numbers, (\w+),", r"rotary_embedding(rows.numbers, \1.clone(),")]},
        "numbers",
    ),
    "cache with tokens before heads": ({"transposed": True}, "constraints"),
    "told that tokens stand before heads": ({"edits": [("BLHD_LAYOUT=False", "BLHD_LAYOUT=True")]}, "constraints"),
    "blocks of 64 tokens": ({"block_size": 64}, "refused"),
    "weight as [in, out]": ({"edits": [(r"w\.gate_up_proj\)", "w.gate_up_proj.t())")]}, "error"),
    "norm taken for functional": (
        {"edits": [(ADD, r"output=\1.clone(), eps=\2,\n\3residual_output=\4)")]}, "constraints",
    ),
    "sum taken for functional": (
        {"edits": [(ADD, r"output=\1, eps=\2,\n\3residual_output=\4.clone())")]}, "constraints",
    ),
    "no place for the sum": ({"edits": [(ADD, r"output=\1, eps=\2)")]}, "constraints"),
    "an operator with an empty body": ({"edits": [(r"_C\.rmsnorm", "_C.rms_norm")]}, "error"),
    "a keyword left out": ({"edits": [("swa_left=-1, ", "")]}, "bind"),
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return sprung("xpu+kernels", {name: trap for name, (trap, _) in TRAPS.items()})


@pytest.mark.parametrize("name", TRAPS)
def test_sprung_trap_is_noticed(found, name):
    assert found[name] == TRAPS[name][1]


def test_stock_torch_is_the_default_and_right():
    assert sprung("xpu", {"nothing": {"cpu": True}}) == {"nothing": "nobody"}
