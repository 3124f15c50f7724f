"""Mistakes that torch_mlu_ops' host code would let pass are noticed without the chip."""

import pytest
from spring import sprung

LINEAR = r"tmo\.matmul\((\w+), w\.(\w+)\)"
TRAPS = {
    "nothing": ({"cpu": True}, "nobody"),
    "nothing, behind a window": ({"cpu": True, "family": "mistral-window"}, "nobody"),
    "heads of 48": ({"cpu": True, "family": "llama-head-48"}, "refused"),
    "cos before sin": ({"edits": [(r"angles\[0\], angles\[1\]", "angles[1], angles[0]")]}, "numbers"),
    "tables of half the width": (
        {"edits": [(r"angles\[0\], angles\[1\]", "angles[0][:, :16].contiguous(), angles[1][:, :16].contiguous()")]},
        "constraints",
    ),
    "pairs rotated instead of halves": ({"edits": [("None, None, False, F", "None, None, True, F")]}, "numbers"),
    "tables of another type": ({"edits": [(r"angles\[0\],", "angles[0].double(),")]}, "constraints"),
    "rotation taken for functional": (
        {"edits": [(r"apply_rotary\((\w+)\.view", r"apply_rotary(\1.clone().view")]}, "numbers",
    ),
    "cache with tokens before heads": ({"transposed": True}, "constraints"),
    "blocks of 128 tokens": ({"block_size": 128}, "refused"),
    "slots of 64 bits": ({"edits": [(r"rows\.slots\)", "rows.slots.long())")]}, "constraints"),
    "weight as [in, out]": ({"edits": [(r"w\.gate_up_proj\)", "w.gate_up_proj.t().contiguous())")]}, "constraints"),
    "square weight as [in, out]": ({"edits": [(r"w\.o_proj\)", "w.o_proj.t().contiguous())")]}, "numbers"),
    "norm and sum swapped": (
        {"edits": [(r"(\w+), (\w+) = tmo\.fused_rms_norm", r"\2, \1 = tmo.fused_rms_norm")]}, "numbers",
    ),
    "norm taken for in place": (
        {"edits": [(r"(\w+), (\w+) = tmo\.fused_rms_norm\((\w+), (\w+), (.*)",
                    r"tmo.fused_rms_norm(\3, \4, \5; \1, \2 = \3, \4")]},
        "numbers",
    ),
    "sum not stored": ({"edits": [(r"(fused_rms_norm\(\w+, \w+, .*), True\)", r"\1, False)")]}, "constraints"),
    "lengths of queries and keys swapped": (
        {"edits": [(r"(rows\.prompts)\.query_offsets, rows\.prompts\.key_offsets",
                    r"\1.key_offsets, \1.query_offsets")]},
        "constraints",
    ),
    "cumulative lengths for decoding": (
        {"edits": [(r"rows\.decodes\.lengths", "rows.decodes.key_offsets")]}, "constraints",
    ),
    "attention that is not causal": ({"edits": [(r"True, -1, -1,", "False, -1, -1,")]}, "constraints"),
    "a window that counts the query's own key": (
        {"family": "mistral-window", "edits": [(r"\b95, -1", "96, -1")]}, "numbers",
    ),
    "an argument too few": ({"edits": [(r"lengths, None, None, None", "lengths, None, None")]}, "bind"),
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return sprung("mlu", {name: trap for name, (trap, _) in TRAPS.items()})


@pytest.mark.parametrize("name", TRAPS)
def test_sprung_trap_is_noticed(found, name):
    assert found[name] == TRAPS[name][1]
