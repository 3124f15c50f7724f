"""What a person sees of a predicted step."""

import json
import re

import pytest

from sagellm.cli import capture

pytest_plugins = ["checkpoints"]


@pytest.fixture(scope="module")
def command(checkpoint, tmp_path_factory):
    folder = checkpoint("Qwen3ForCausalLM")
    file = tmp_path_factory.mktemp("timeline") / "requests.json"
    file.write_text(json.dumps([{"prompt": list(range(100)), "max_tokens": 4}]))
    return ["compile", "-m", str(folder), "--requests", str(file), "--emit", "timeline"]


def test_lanes_operations_and_the_total_are_told(command):
    done = capture([*command, "--tensor-parallel", "2", "--topology", "hccs"])
    assert done.code == 0, done.stderr
    text = done.stdout
    assert "Predicted, not measured: the model on each of 2 ranks, 100 tokens, 1 with logits." in text
    assert "network  hccs: mesh, 28 GB/s a link" in text
    assert re.search(r"^@layers.dense: 3 times [0-9.]+ us$", text, re.M)
    bars = re.findall(r"^  (compute|network) *\|([#=.]{72})\| [0-9.]+ us$", text, re.M)
    assert [lane for lane, _ in bars] == ["compute", "network"] * 3
    assert all(set(bar) <= {"#" if lane == "compute" else "=", "."} for lane, bar in bars)
    total, without = (
        float(re.search(rf"^{name} +([0-9.]+) us", text, re.M)[1]) for name in ("total", "without .*overlap")
    )
    assert 0 < total <= without


def test_one_rank_has_no_network(command):
    text = capture(command).stdout
    assert "the model on one rank" in text and "network" not in text


def test_the_trace_holds_every_layer(command, tmp_path):
    path = tmp_path / "trace.json"
    done = capture([*command, "--tensor-parallel", "2", "--topology", "pcie", "-o", str(path)])
    assert done.stdout.endswith(f"wrote {path}, for chrome://tracing or ui.perfetto.dev\n")
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"compute", "network"}
    spans = [e for e in events if e["ph"] == "X"]
    sums = [e for e in spans if e["name"].endswith("comm.all_reduce")]
    assert len(sums) == 1 + 2 * 3 and all(e["tid"] == 1 and e["dur"] > 0 for e in sums)
    assert {e["args"]["call"] for e in sums if e["args"]["function"] == "layers.dense"} == {0, 1, 2}
    total = float(re.search(r"^total +([0-9.]+) us", done.stdout, re.M)[1])
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(total, abs=0.1)


def test_a_folder_that_is_not_there_is_one_line(command, tmp_path):
    done = capture([*command, "-o", str(tmp_path / "none" / "trace.json")])
    assert done.code == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1


def test_the_benchmark_of_overlap_never_loses():
    done = capture(["bench", "overlap", "--ranks", "2", "--json"])
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["topology"] for r in results} == {"hccs", "pcie"}
    assert all(r["with_ms"] <= r["without_ms"] for r in results)
    assert {r["layers"] for r in results} == {"applied", "declined"}
    assert all(r["layers"] == "declined" for r in results if r["tokens"] == 1)


def test_unknown_topologies_are_named(command):
    done = capture([*command, "--topology", "mars"])
    assert done.code == 2 and "unknown topology 'mars'; accepted: auto, gloo, hccs, pcie" in done.stderr
