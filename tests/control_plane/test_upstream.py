"""SAGE's own control plane and gateway (`isagellm-control-plane`, `isagellm-gateway` 0.5) drive an engine of ours.

They run where they can be imported, or by the interpreter that `SAGELLM_UPSTREAM_PYTHON` names: an environment of their
own, of this Python's version, which borrows our libraries for the object form.
"""

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import servers

from sagellm.batch import SamplingParams
from sagellm.engine.engine import SageLLMEngine
from sagellm.server.app import app_of

HERE = Path(__file__).parent
NEEDED = ("sagellm_control", "sagellm_gateway", "sagellm_protocol")
PYTHON = os.environ.get("SAGELLM_UPSTREAM_PYTHON")
if PYTHON is None and all(find_spec(name) for name in NEEDED):
    PYTHON = sys.executable
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason=f"{NEEDED[0]} is not installed, and SAGELLM_UPSTREAM_PYTHON names no interpreter"
)
MESSAGES = [{"role": "user", "content": "你好"}]


def drive(*how):
    paths = os.pathsep.join([str(HERE.parents[1]), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [PYTHON, str(HERE / "upstream_drive.py"), *map(str, how)],
        env=os.environ | ({"PYTHONPATH": paths} if how == ("object",) else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def over_http():
    with SageLLMEngine("builtin", dtype="float32", max_length=512) as engine:
        expected = asyncio.run(engine.chat(MESSAGES, SamplingParams(max_tokens=8)))
        with servers.running(app_of(engine)) as address:
            host, _, port = address.removeprefix("http://").partition(":")
            found = drive("http", host, port, engine.model_id)
        return found, expected


@pytest.fixture(scope="module")
def as_object():
    return drive("object")


def text_of(events):
    return "".join(event["content"] for event in events if event["event"] == "delta")


def streamed(lines):
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def check_gateway(found, said):
    gateway = found["gateway"]
    assert [model["id"] for model in gateway["models"]["data"]] == ["builtin"]
    assert gateway["chat"]["status"] == gateway["text"]["status"] == 200
    assert gateway["chat"]["body"]["choices"][0]["message"]["content"] == said
    assert streamed(gateway["stream"]) == said and gateway["stream"][-1] == "data: [DONE]"


def test_their_control_plane_drives_our_server(over_http):
    found, alone = over_http
    assert (found["one"], found["vectors"]) == ("READY", "READY")
    for name in ("chat", "again"):
        answer = found[name]
        assert (answer["output_text"], answer["finish_reason"]) == (alone.text, alone.finish_reason)
        assert answer["prompt_tokens"] == alone.prompt_tokens and answer["error"] is None
        assert len(answer["output_tokens"]) == len(alone.token_ids)
    assert found["text"]["finish_reason"] in ("stop", "length") and found["text"]["output_text"]
    assert [event["event"] for event in found["stream"]][:: len(found["stream"]) - 1] == ["start", "end"]
    assert text_of(found["stream"]) == alone.text
    assert [len(vector) for vector in found["embeddings"]] == [256, 256]


def test_their_gateway_drives_our_server(over_http):
    found, alone = over_http
    check_gateway(found, alone.text)


def test_our_engine_is_an_object_of_their_control_plane(as_object):
    found = as_object
    for name in ("chat", "again"):
        assert found[name]["output_text"] == found["direct"] and found[name]["error"] is None
    start, *pieces, end = found["stream"]
    assert start["event"] == "start" and start["prompt_tokens"] == found["chat"]["prompt_tokens"]
    assert {piece["event"] for piece in pieces} == {"delta"} and text_of(pieces) == found["direct"]
    assert [t for piece in pieces for t in piece["content_tokens"]] == found["chat"]["output_tokens"]
    assert (end["event"], end["finish_reason"], end["error"]) == ("end", found["chat"]["finish_reason"], None)
    assert [len(vector) for vector in found["embeddings"]] == [256, 256]


def test_their_gateway_over_our_object(as_object):
    check_gateway(as_object, as_object["direct"])
    # over HTTP it asks for a model "default", whatever the client said
    answer = as_object["gateway"]["embeddings"]
    assert answer["status"] == 200
    assert [len(one["embedding"]) for one in answer["body"]["data"]] == [256, 256]


def test_what_the_object_is_asked_is_honoured_or_refused(as_object):
    one, two = as_object["drawn"]
    assert one["output_text"] == two["output_text"] and "\n" not in one["output_text"]
    errors = {
        "beams": "unknown strategy 'beam_search'; accepted: greedy, sampling, speculative",
        "empty": "prompt and messages are empty; accepted: one of them",
    }
    for name, said in errors.items():
        answer = as_object[name]
        assert (answer["finish_reason"], answer["output_text"]) == ("error", "")
        assert answer["error"] == {"code": "invalid_argument", "message": said, "retryable": False}
    for name, said in (("phase", "phase is 'prefill'"), ("too long", "the prompt has 2002 tokens")):
        start, end = as_object[name]
        assert (start["event"], end["event"], end["finish_reason"]) == ("start", "end", "error")
        assert end["error"]["message"].startswith(said) and "metrics" in end


def test_figures_are_measured_and_a_hit_is_what_was_not_computed_again(as_object):
    for name in ("chat", "text", "again"):
        figures = as_object[name]["metrics"]
        assert figures["ttft_ms"] > 0 and figures["tpot_ms"] > 0 and figures["throughput_tps"] > 0
        assert 0 <= figures["prefix_hit_rate"] < 1 and figures["error_rate"] == 0
    assert as_object["beams"]["metrics"]["error_rate"] == 1
