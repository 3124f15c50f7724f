"""Mistakes that torch_npu's host code lets pass, each of which the contract catches."""

import ast
import re
from types import SimpleNamespace

import pytest
import torch

from sagellm import backends
from sagellm.backends import sampling
from sagellm.backends.ascend import kernels
from sagellm.backends.ascend.contract import CONTRACT
from sagellm.conformance import operations
from sagellm.conformance.stand_in import ContractBroken, checked
from sagellm.models.config import load_config
from sagellm.models.decoder import build_model
from sagellm.models.hub import resolve


def call(name, *args, **kwargs):
    return checked(CONTRACT.find(f"npu::{name}"), args, kwargs)


def broken(layer, name, *args, **kwargs):
    with pytest.raises(ContractBroken) as caught:
        call(name, *args, **kwargs)
    assert caught.value.layer == layer
    return str(caught.value)


def half(*shape):
    return torch.randn(shape).bfloat16()


def attention(**changes):
    """Two sequences: one decodes over 200 tokens, one has 3 of its 9 queries in this step."""
    mask = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)
    return {
        "num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND", "scale": 0.25,
        "block_size": 128, "sparse_mode": 3,
        "block_table": torch.tensor([[1, 2], [3, 0]], dtype=torch.int32), "atten_mask": mask,
        "actual_seq_lengths": [1, 4], "actual_seq_lengths_kv": [200, 9],
    } | changes  # fmt: skip


QKV = half(4, 4, 16), half(5, 128, 32), half(5, 128, 32)
FIA = "npu_fused_infer_attention_score"


def without(arguments, name):
    return {k: v for k, v in arguments.items() if k != name}


def test_trap_1_k_and_p_exchanged():
    logits, p, k = torch.randn(2, 30), torch.tensor([0.9, 0.5]), torch.tensor([3, 5], dtype=torch.int32)
    assert (call("npu_top_k_top_p", logits, p, k) > -torch.inf).sum(1).tolist()[0] <= 3
    assert "k int32" in broken("constraints", "npu_top_k_top_p", logits, k, p)


def test_tokens_as_likely_as_the_kth_stay():
    logits, k = torch.tensor([[1.0, 3.0, 2.0, 2.0]]), torch.tensor([2], dtype=torch.int32)
    kept = call("npu_top_k_top_p", logits, torch.ones(1), k)
    assert kept.tolist() == [[-torch.inf, 3.0, 2.0, 2.0]]


def test_filters_of_rows_that_the_call_does_not_take_are_in_stock_torch(monkeypatch):
    """k of 0 keeps all, and the call has a largest k; which rows there are, the host knows."""
    calls = []

    def stand_in(*given):
        calls.append(given)
        return call("npu_top_k_top_p", *given)

    monkeypatch.setattr(kernels.torch.ops, "npu", SimpleNamespace(npu_top_k_top_p=stand_in), raising=False)
    logits, p = torch.randn(3, 3000), torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)
    for drawing, k in (
        ([0, 1, 2], (1, 1024, 7)),
        ([0, 1], (5, 9, 0)),
        ([0, 1, 2], (5, 9, 0)),
        ([0], (1025, 2, 3)),
    ):
        span = min(k[i] for i in drawing), max(k[i] for i in drawing)
        how = SimpleNamespace(top_k=torch.tensor(k), top_p=p, top_k_span=span)
        calls.clear()
        ours = kernels.top_k_top_p(logits, how)
        assert len(calls) == (span[0] >= 1 and span[1] <= 1024)
        theirs = sampling.top_p(sampling.top_k(logits, how.top_k), p)
        assert torch.equal(ours[drawing], theirs[drawing])
        assert torch.equal(ours.argmax(1), logits.argmax(1))


def test_what_is_quantised_twice_or_smoothed_is_not_what_was_meant():
    x, w = half(3, 8), half(8)
    values, _, total, scales, _ = call("npu_add_rms_norm_dynamic_quant", x, x, w, output_mask=[True, False])
    assert values.shape == x.shape and scales.shape == (3,) and torch.equal(total, x + x)
    assert "output_mask is None" in broken("constraints", "npu_add_rms_norm_dynamic_quant", x, x, w)
    smooth = {"smooth_scale1": w, "output_mask": [True, False]}
    assert "without smoothing" in broken("constraints", "npu_add_rms_norm_dynamic_quant", x, x, w, **smooth)
    assert "gamma" in broken(
        "constraints", "npu_add_rms_norm_dynamic_quant", x, x, half(4), output_mask=[True, False]
    )
    assert "by token" in broken("constraints", "npu_dynamic_quant", x, quant_mode="pertensor")


def test_a_product_and_its_sum_want_the_matrix_transposed_and_a_group():
    x, w = half(3, 8), half(4, 8)
    assert call("npu_mm_all_reduce_base", x, w.t(), "group").shape == (3, 4)
    assert "[k, n]" in broken("constraints", "npu_mm_all_reduce_base", x, w, "group")
    assert "nothing empty" in broken("constraints", "npu_mm_all_reduce_base", x[:0], w.t(), "group")
    assert "hcom" in broken("constraints", "npu_mm_all_reduce_base", x, w.t(), "")
    assert "missing" in broken("bind", "npu_mm_all_reduce_base", x, w.t())


def test_a_sum_that_is_left_out_is_noticed():
    """By what verify-backend compares of operations that no model has: two ranks in lockstep."""
    summed = operations.compute("cpu", "float32")
    alone = operations.compute(
        "cpu", "float32", lambda work: [work(rank, operations.Alone()) for rank in (0, 1)]
    )
    assert operations.apart(summed, summed) == (0, 0)
    assert operations.apart(alone, summed)[0] > 0.1
    torch.testing.assert_close(alone["summed"][0] + alone["summed"][1], summed["summed"][0])


def test_trap_2_the_cache_mode_left_out_or_misspelt():
    tensors = half(3, 2, 16), half(3, 2, 16), half(5, 128, 2, 16), half(5, 128, 2, 16)
    slots = torch.tensor([5, 6, 300], dtype=torch.int32)
    call("npu_scatter_pa_kv_cache", *tensors, slots, cache_mode="Norm")
    for wrong in ({}, {"cache_mode": "norm"}):
        assert "cache_mode is" in broken("constraints", "npu_scatter_pa_kv_cache", *tensors, slots, **wrong)
    repeated = torch.tensor([5, 5, 300], dtype=torch.int32)
    assert "twice" in broken("constraints", "npu_scatter_pa_kv_cache", *tensors, repeated, cache_mode="Norm")


def test_trap_3_interleave_and_interleaved():
    positions, q, table = torch.arange(3), half(3, 64), half(3, 32)
    how = {"mrope_section": [0, 0, 0], "cache_mode": "default"}
    call("npu_mrope", positions, q, q, table, 32, rotary_mode="interleaved", **how)
    assert "accepted: half, interleaved" in broken(
        "constraints", "npu_mrope", positions, q, q, table, 32, rotary_mode="interleave", **how
    )
    x, cos = half(1, 3, 2, 32), half(1, 3, 1, 32)
    call("npu_rotary_mul", x, cos, cos, rotary_mode="interleave")
    broken("constraints", "npu_rotary_mul", x, cos, cos, rotary_mode="interleaved")


def test_trap_4_names_of_the_second_version_and_defaults_that_are_wrong():
    call(FIA, *QKV, **attention())
    renamed = {"num_query_heads": 4, "softmax_scale": 0.25, "actual_seq_qlen": [1, 4]}
    assert "unexpected keyword" in broken("bind", FIA, *QKV, **attention(), **renamed)
    assert "left at 1.0" in broken("constraints", FIA, *QKV, **without(attention(), "scale"))
    assert "num_key_value_heads" in broken(
        "constraints", FIA, *QKV, **without(attention(), "num_key_value_heads")
    )


def test_trap_5_cumulative_lengths_and_lengths_exchanged():
    exchanged = attention(actual_seq_lengths=[200, 9], actual_seq_lengths_kv=[1, 4])
    assert "cumulative" in broken("constraints", FIA, *QKV, **exchanged)
    assert "cumulative" in broken("constraints", FIA, *QKV, **attention(actual_seq_lengths=[1, 3]))
    # Cumulative lengths of keys reach behind the table.
    broken("constraints", FIA, *QKV, **attention(actual_seq_lengths_kv=[200, 409]))


@pytest.mark.parametrize("chip", ["910B", "310P"])
def test_trap_6_positions_only_for_what_is_required(chip):
    """Published pages lag behind the schemas, so what is optional goes by name."""
    config = load_config(resolve("builtin"), "builtin")
    dtype = "float16" if chip == "310P" else "bfloat16"
    graph = build_model(config, dtype, ("decode", "prefill", "cascade"))
    source = backends.load(f"ascend:{chip}").emit(graph, "f").source
    found = 0
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not re.fullmatch(r"torch\.ops\.(npu|atb)\.\w+|torch_npu\.\w+", name):
            continue
        known = CONTRACT.find(re.sub(r"torch\.ops\.(\w+)\.", r"\1::", name))
        assert known is not None, f"{name} is in no contract"
        required = [p for p in known.signature.parameters.values() if p.default is p.empty]
        assert sum(2 if isinstance(a, ast.Starred) else 1 for a in node.args) <= len(required), name
        found += 1
    assert found > 4


def test_trap_10_caches_in_another_layout_and_blocks_of_another_size():
    k, slots = half(3, 2, 16), torch.tensor([5, 6, 300], dtype=torch.int32)
    hnd = half(5, 2, 128, 16), half(5, 2, 128, 16)
    assert "into a cache" in broken(
        "constraints", "npu_scatter_pa_kv_cache", k, k, *hnd, slots, cache_mode="Norm"
    )
    for size in (16, 100):
        broken("constraints", FIA, *QKV, **attention(block_size=size))


def test_trap_12_results_that_are_not_asked_for():
    assert call(FIA, *QKV, **attention())[1].shape == (0,)
    assert call(FIA, *QKV, **attention(softmax_lse_flag=True))[1].shape == (4, 4, 1)
    assert len(call("npu_rms_norm", half(2, 8), half(8), 1e-6)) == 2


def test_trap_13_the_sum_comes_back_and_is_not_written_over_its_operands():
    x, y, w = half(2, 8), half(2, 8), half(8)
    before = x.clone(), y.clone()
    _, _, total = call("npu_add_rms_norm", x, y, w, 1e-6)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and torch.equal(total, x + y)


def test_what_the_host_code_accepts_and_the_chip_does_not():
    assert "gamma" in broken("constraints", "npu_rms_norm", half(2, 8), half(4))
    assert "no halves" in broken("constraints", "npu_swiglu", half(2, 7))
    assert "not of one type" in broken(
        "constraints", "npu_add_rms_norm", half(2, 8), half(2, 8).half(), half(8)
    )
    assert "mask of int8" in broken("constraints", FIA, *QKV, **attention(atten_mask=None))
    assert "is not contiguous" in broken("constraints", FIA, QKV[0].transpose(0, 1), *QKV[1:], **attention())
    assert "head size 8" in broken(
        "constraints", FIA, half(4, 4, 8), half(5, 128, 16), half(5, 128, 16), **attention()
    )


def test_windows_count_the_token_itself():
    """A band reaches so many tokens back beside the query's own."""
    q, k, v = QKV
    wide = attention(sparse_mode=4, pre_tokens=2, next_tokens=0)
    last = call(FIA, q, k, v, **wide)[0][0]
    keys = SimpleNamespace(k=k[2, 69:72].unflatten(1, (2, 16)), v=v[2, 69:72].unflatten(1, (2, 16)))
    scores = torch.einsum("hd,thd->ht", q[0].float(), keys.k.float().repeat_interleave(2, 1)) * 0.25
    expected = torch.einsum("ht,thd->hd", scores.softmax(-1), keys.v.float().repeat_interleave(2, 1))
    torch.testing.assert_close(last.float(), expected, rtol=2e-2, atol=2e-2)
