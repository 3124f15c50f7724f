"""Mistakes that lightop and flash_attn would let pass are noticed without the chip."""

import pytest
from spring import sprung

ADD = r"lightop\.norm\.fused_add_rms_norm\((\w+), (\w+),"
TRAPS = {
    "nothing": ({"cpu": True}, "nobody"),
    "nothing, behind a window": ({"cpu": True, "family": "mistral-window"}, "nobody"),
    "nothing, with heads of 48": ({"cpu": True, "family": "llama-head-48"}, "nobody"),
    "input before output": (
        {"edits": [(r"silu_and_mul_opt\((\w+), (\w+)\)", r"silu_and_mul_opt(\2, \1)")]}, "constraints",
    ),
    "the kernel whose output comes last": (
        {"edits": [(r"lightop\.activation\.silu_and_mul_opt", "lightop.fuse_silu_and_mul")]}, "error",
    ),
    "norm taken for functional": ({"edits": [(ADD, r"lightop.norm.fused_add_rms_norm(\1.clone(), \2,")]}, "numbers"),
    "sum taken for functional": ({"edits": [(ADD, r"lightop.norm.fused_add_rms_norm(\1, \2.clone(),")]}, "numbers"),
    "norm and sum swapped": ({"edits": [(ADD, r"lightop.norm.fused_add_rms_norm(\2, \1,")]}, "numbers"),
    "one tensor twice": ({"edits": [(ADD, r"lightop.norm.fused_add_rms_norm(\1, \1,")]}, "constraints"),
    "cache with heads before tokens": ({"transposed": True}, "constraints"),
    "blocks of 16 tokens": ({"block_size": 16}, "refused"),
    "weight as [in, out]": ({"edits": [(r"w\.gate_up_proj\)", "w.gate_up_proj.t())")]}, "error"),
    "square weight as [in, out]": ({"edits": [(r"w\.o_proj\)", "w.o_proj.t())")]}, "numbers"),
    "cumulative lengths of keys": (
        {"edits": [(r"rows\.sequences\.lengths", "rows.sequences.key_offsets")]}, "constraints",
    ),
    "lengths of 64 bits": ({"edits": [(r"rows\.sequences\.lengths", "rows.sequences.lengths.long()")]}, "constraints"),
    "scale left out": ({"edits": [(r"softmax_scale=[\d.e-]+, ", "")]}, "constraints"),
    "a window that counts the query's own key": (
        {"family": "mistral-window", "edits": [(r"window_size=\(95, 0\)", "window_size=(96, 0)")]}, "numbers",
    ),
    "a keyword of another release": ({"edits": [("seqused_k=", "cache_seqlens=")]}, "bind"),
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return sprung("dcu+kernels", {name: trap for name, (trap, _) in TRAPS.items()})


@pytest.mark.parametrize("name", TRAPS)
def test_sprung_trap_is_noticed(found, name):
    assert found[name] == TRAPS[name][1]


def test_stock_torch_is_the_default_and_right():
    assert sprung("dcu", {"nothing": {"cpu": True}}) == {"nothing": "nobody"}
