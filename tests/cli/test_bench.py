"""`sagellm bench`: figures of a real engine, as a table, as JSON, as a picture."""

import json

import numpy as np
import pytest
from checkpoints import make_core, serve, tokens_of

from sagellm.batch import SamplingParams
from sagellm.bench.copier import write_copier
from sagellm.cli import capture

pytest_plugins = ["checkpoints"]


@pytest.fixture(scope="module")
def model(checkpoint):
    """It has no tokenizer: benchmarks speak token ids."""
    return str(checkpoint("LlamaForCausalLM"))


def results(*arguments):
    code, out, err = capture(["bench", *arguments, "--json"])
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_latency_of_single_requests_and_of_a_short_one_behind_a_long_one(model):
    alone, behind = results(
        "latency", "-m", model, "--prompt", "20", "--output", "5", "--repeats", "3", "--behind", "200",
        "--max-batched-tokens", "32",
    )  # fmt: skip
    assert (
        alone["requests"] == 3
        and alone["tpot_p50_ms"] > 0
        and 0 < alone["ttft_p50_ms"] <= alone["e2e_p50_ms"]
    )
    assert alone["itl_p50_ms"] <= alone["itl_p99_ms"]
    assert set(behind) == {"ttft_200_tokens_ms", "ttft_5_tokens_ms", "ttft_5_tokens_behind_ms"}


def test_guessing_is_compared_with_plain_steps(model):
    """The model has no tokenizer, so there are no code edits."""
    again, batch, quotes = results(
        "speculation", "-m", model, "--output", "12", "--requests", "2", "--batch", "3", "--repeats", "1"
    )
    assert again["workload"] == "again" and again["accepted"] > 0 and again["steps"] < 48
    assert batch["workload"] == "random x3" and batch["requests"] == 3
    assert quotes["accepted"] > 10 and quotes["steps"] < 10
    assert again["different"] == batch["different"] == quotes["different"] == 0
    assert min(again["ratio"], batch["ratio"], quotes["ratio"]) > 0


def test_the_model_that_quotes_finds_the_place(tmp_path):
    core = make_core(write_copier(tmp_path))
    document = np.random.default_rng(0).integers(3, 4096, 200).tolist()
    prompts = [document + document[at : at + 8] for at in range(0, 96, 16)]
    quoted = tokens_of(serve(core, prompts, SamplingParams(max_tokens=40)))
    assert quoted == [document[at + 8 : at + 48] for at in range(0, 96, 16)]


def test_throughput_counts_every_token(model):
    (one,) = results("throughput", "-m", model, "--prompt", "9:12", "--output", "3", "--requests", "10")
    assert one["requests"] == 10
    assert one["output_tokens_per_s"] == pytest.approx(30 / one["seconds"])
    assert 90 <= one["prompt_tokens_per_s"] * one["seconds"] <= 120.001


def test_latency_over_load_as_a_picture(model, tmp_path):
    picture = tmp_path / "load.png"
    some = results(
        "serve", "-m", model, "--rate", "50", "--rate", "200", "--requests", "12", "--prompt", "8", "--output", "4",
        "--plot", str(picture),
    )  # fmt: skip
    assert [one["rate"] for one in some] == [50, 200]
    assert all(one["requests"] == 12 and one["refused"] == 0 for one in some)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_trace_finds_what_it_shares(model, tmp_path):
    trace = tmp_path / "trace.jsonl"
    entry = {"timestamp": 0, "input_length": 2048, "output_length": 64, "hash_ids": [0, 1, 2, 3]}
    trace.write_text("".join(json.dumps(entry | {"timestamp": at}) + "\n" for at in (0, 1000, 2000)))
    (one,) = results("serve", "-m", model, "--trace", str(trace), "--rate", "4", "--requests", "3")
    assert one["requests"] == 3 and one["cached"] == pytest.approx(2 * 63 / (3 * 64)), (
        "all but the last token"
    )


def test_host_counts_calls():
    (one,) = results("host", "--sequences", "8", "--steps", "5")
    assert one["plan_hits"] == 1.0 and 0 < one["calls"] <= 1000 and one["best_us"] <= one["median_us"]


def test_a_table_has_a_line_a_load(model):
    code, out, _ = capture(
        ["bench", "serve", "-m", model, "--rate", "100", "--requests", "4", "--output", "3"]
    )
    heads, line = (text.split() for text in out.splitlines())
    assert code == 0 and len(heads) == len(line) and line[:2] == ["100", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown benchmark 'nothing'; accepted: "),
        (["latency", "--prompt", "5:2"], "--prompt is '5:2'; accepted: tokens, or LOW:HIGH"),
        (["throughput", "--output", "x"], "--output is 'x'; accepted: tokens, or LOW:HIGH"),
        (["serve", "--trace", "nowhere.jsonl"], "cannot read a trace from 'nowhere.jsonl'"),
        (["serve", "--rate", "0"], "--rate"),
        (["latency", "--behind", "400", "--max-length", "256"], "--behind is 400; accepted: less than"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, message):
    code, _, err = capture(["bench", *arguments])
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_server_is_compared_with_its_engine(model):
    (one,) = results(
        "http",
        "-m",
        model,
        "--prompt",
        "9",
        "--output",
        "4",
        "--streams",
        "3",
        "--pairs",
        "1",
        "--core",
        "inline",
    )
    assert one["streams"] == 3 and one["ratio"] == one["server_tokens_per_s"] / one["engine_tokens_per_s"] > 0
