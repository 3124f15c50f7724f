"""A server's life: clients that go away, an end that waits for streams, and what cannot be served."""

import signal
import time

import httpx
import pytest
from serving import server, within

from sagellm.cli import capture
from sagellm.server.config import ServerConfig

pytest_plugins = ["checkpoints"]

POSITIONS = 8192
LONG = {"model": "toy", "prompt": [1, 2, 3], "max_tokens": 8000, "ignore_eos": True, "temperature": 0}
"""So long that it is not over before its client goes away, however slow that one is just now."""


@pytest.fixture(scope="module")
def model(checkpoint):
    return str(checkpoint("LlamaForCausalLM", max_position_embeddings=POSITIONS))


def gauge(address, name):
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"sagellm_{name}{{")))


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_client_that_goes_away_ends_its_request_and_the_end_waits_for_streams(model):
    with server("-m", model, "--served-model-name", "toy") as (process, address):
        path, streamed = f"{address}/v1/completions", {"stream": True}
        with httpx.stream("POST", path, json=LONG | streamed, timeout=60) as answer:
            next(answer.iter_lines())
        until(lambda: gauge(address, "running_sequences") == 0 and gauge(address, "kv_blocks_used") == 0)
        assert gauge(address, "generated_tokens_total") < LONG["max_tokens"]
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(path, json=LONG | {"n": 20}, timeout=httpx.Timeout(60, read=0.05))
        until(lambda: gauge(address, "running_sequences") == 0 and gauge(address, "kv_blocks_used") == 0)
        assert gauge(address, "generated_tokens_total") < 20 * LONG["max_tokens"]
        body = LONG | streamed | {"max_tokens": 200}
        with httpx.stream("POST", path, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and sum('"finish_reason":"length"' in line for line in rest) == 1
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_a_model_without_tokenizer_takes_tokens(model):
    with within(model, ServerConfig(port=0, served_model_name="toy")) as address:
        made = httpx.post(f"{address}/v1/completions", json=LONG | {"max_tokens": 5}, timeout=60).json()
        assert made["usage"]["completion_tokens"] == 5 and len(made["choices"][0]["token_ids"]) == 5
        text = httpx.post(f"{address}/v1/completions", json=LONG | {"prompt": "text"}, timeout=60)
        assert text.status_code == 400 and "has no tokenizer.json; accepted: token ids" in text.text
        chat = {"model": "toy", "messages": [{"role": "user", "content": "x"}]}
        assert httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=60).status_code == 400


def test_what_the_command_is_told_reaches_server_and_engine(monkeypatch):
    seen = []
    monkeypatch.setattr("sagellm.server.run.run", lambda *configs: seen.extend(configs))
    monkeypatch.setenv("SAGELLM_MAX_QUEUE", "20")
    words = ["--port", "0", "--api-key", "k", "--served-model-name", "toy", "--max-body-bytes", "9"]
    assert capture(["serve", *words, "--debug-routes", "--core", "inline", "--dtype", "float32"]).code == 0
    server, engine = seen
    assert server == ServerConfig(
        port=0, api_keys=("k",), served_model_name="toy", max_body_bytes=9, debug_routes=True
    )
    assert (engine.core, engine.dtype, engine.max_queue, engine.explain_steps) == (
        "inline",
        "float32",
        20,
        64,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "--core", "inline"], "nowhere/at/all"),
        (["builtin", "--model", "builtin"], "--model and MODEL are both given; accepted: one of them"),
        (
            ["-p", "cleanup", "--speculative"],
            "the pipeline has no speculative-branching; accepted: one that has",
        ),
        (["--port", "70000"], "port is 70000; accepted: a port from 0 to 65535"),
        (["--api-key-file", "nowhere"], "cannot read keys from 'nowhere'"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        (["--drain-seconds", "-1"], "drain_seconds is -1.0; accepted: a number at least 0"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    port = [] if "--port" in arguments else ["--port", "0"]
    code, _, err = capture(["serve", *arguments, *port])
    assert code == 2 and message in err.splitlines()[-1]
