"""What passes between an engine and who uses it: requests, results, prompts outside of an engine, figures, costs."""

import math

import numpy as np
import pytest

from sagellm.batch import SamplingParams
from sagellm.engine.base import EngineState, GenerateRequest, GenerateResult, Health, KVHandle, Output
from sagellm.engine.stats import EngineStats, Histogram, Times
from sagellm.errors import UserError
from sagellm.schemas import KVCacheSchema
from sagellm.target import AttentionShape, CapabilityDescriptor, CostModel, StepCost

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"resume": [1, -1]}, "resume has -1; accepted: token ids"),
        ({"resume": [True]}, "resume has True; accepted: token ids"),
        ({"resume": ["a"]}, "resume has 'a'; accepted: token ids"),
        ({"resume": [1], "sampling": SamplingParams(n=2)}, "resume is given with n 2; accepted: with one output"),
        ({"resume": [1], "pooling": "mean"}, "resume is given with pooling"),
        ({"resume": [1], "sampling": SamplingParams(prompt_logprobs=0)}, "resume is given with prompt_logprobs"),
        ({"resume": [1] * 9, "sampling": SamplingParams(max_tokens=8)}, "resume has 9 tokens; accepted: at most max_"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_go_on_is_one_line(given, said):
    with pytest.raises(UserError) as refused:
        GenerateRequest(prompt="a", **given)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_request_wants_nothing_that_it_does_not_say():
    request = GenerateRequest(prompt=[1, 2], resume=[3])
    assert (request.resume, request.deadline, request.priority, request.salt) == ((3,), math.inf, 0, "")


def test_a_result_speaks_of_its_first_output():
    first = Output("ab", [1, 2], "length", None, [-0.5, -1.0], [((1, -0.5),), ((2, -1.0),)])
    result = GenerateResult("r", 3, [first, Output("c", [9], "stop")])
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", [1, 2], "length")
    assert result.logprobs == [-0.5, -1.0] and result.top_logprobs == first.top_logprobs


def test_only_ready_is_ready():
    assert [state for state in EngineState if Health(state).ready] == [EngineState.READY]


def test_a_prompt_survives_its_file(tmp_path):
    schema = KVCacheSchema(dtype="bf16", block_size=4, num_layers=1, num_kv_heads=2, head_dim=8)
    values = np.arange(schema.bytes_per_block, dtype=np.uint8)
    KVHandle(model_id="m", schema=schema, tokens=[1, 2, 3, 4], values=values).save(tmp_path / "kv")
    found = KVHandle.load(tmp_path / "kv")
    assert (found.model_id, found.schema, found.tokens) == ("m", schema, [1, 2, 3, 4])
    assert np.array_equal(found.values, values)


def test_a_file_that_holds_no_prompt_is_one_line(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "noise").write_bytes(b"noise")
    save_file({"tokens": np.zeros(1, np.int64)}, tmp_path / "other")
    for name in ("noise", "other", "missing"):
        with pytest.raises(UserError, match=rf"^'.*{name}' is no KV handle: ") as refused:
            KVHandle.load(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_times_fall_between_bounds():
    histogram = Histogram((0.1, 1.0))
    histogram.add(np.array([0.05, 0.1, 0.5, 3.0]))
    histogram.add_one(0.2)
    assert histogram.summary() == {
        "count": 5,
        "sum": pytest.approx(3.85),
        "bounds": [0.1, 1.0],
        "counts": [2, 2, 1],
    }
    assert Times().host.bounds[0] == 1e-4


def test_shares_of_nothing_are_nothing():
    names = [a.name for a in EngineStats.__attrs_attrs__]
    zeros = dict.fromkeys(names, 0) | {"times": {"ttft": Times().ttft.summary()}}
    stats = EngineStats(**zeros)
    assert (stats.plan_hit_ratio, stats.mean("ttft")) == (0, 0)
    assert EngineStats(**zeros | {"plan_hits": 3, "plan_misses": 1}).plan_hit_ratio == 0.75


def test_work_takes_the_longer_of_its_arithmetic_and_its_memory():
    costs = CostModel(flops={"float32": 1e9, "bfloat16": 2e9}, bytes_per_second=1e9, call=1e-3, narrow=0.5)
    assert costs.seconds(flops=2e9, moved=1e9) == pytest.approx(2.001)
    assert costs.seconds(flops=2e9, moved=4e9, dtype="bfloat16", calls=0) == pytest.approx(4.0)
    assert costs.seconds(flops=1e9, dtype="float16", calls=0) == pytest.approx(1.0), (
        "the slowest, where unknown"
    )
    assert costs.part(2).seconds(flops=1e9, calls=0) == pytest.approx(2.0)
    assert costs.product(1, 1000, 1000, "float32") == pytest.approx(4 * 1_002_000 / 1e9 + 1e-3)


def test_a_step_reads_its_weights_however_few_its_tokens():
    costs = CostModel(flops={"float32": 1e9}, bytes_per_second=1e9, call=0.0)
    step = StepCost.of(costs, parameters=1_000_000, layers=2, dtype="float32")
    assert list(step.seconds(np.array([1, 2, 4]))) == pytest.approx([0.004, 0.004, 0.008])


def test_attention_that_reads_once_for_all_moves_less():
    costs = CostModel(flops={"float32": 1e15}, bytes_per_second=1e9, call=0.0)
    shape = AttentionShape(heads=2, kv_heads=1, head_dim=8, layers=3, dtype="float32")
    apart, together = shape.seconds(costs, 4, 1000, reads=4), shape.seconds(costs, 4, 1000, reads=1)
    assert apart == pytest.approx(4 * together) and together == pytest.approx(2 * 3 * 8 * 4 * 1000 / 1e9)


def test_a_dtype_that_a_backend_has_not_is_one_line():
    one = CapabilityDescriptor(
        backend="b", device="cpu", dtypes=("float32",), kernels=frozenset(), kv_dtypes=(), block_sizes=()
    )
    one.check_dtype("float32")
    with pytest.raises(UserError, match=r"^unknown dtype for b 'int8'; accepted: float32$"):
        one.check_dtype("int8")
