"""Many clients at once, some of whom go away; and the client of another language."""

import asyncio
import json
import random
import shutil
import subprocess
import time

import httpx
import pytest
from serving import within

from sagellm.batch import SamplingParams
from sagellm.engine.engine import SageLLMEngine
from sagellm.server.config import ServerConfig

pytest_plugins = ["checkpoints"]

STREAMS = 64
PROMPTS = ["The quick brown fox", "中文分词器", "naïve café", "x", "no, no, no!"]


@pytest.fixture(scope="module")
def address(text_checkpoint):
    config = ServerConfig(port=0, served_model_name="m")
    with within(text_checkpoint, config, core="process", max_sequences=16) as found:
        yield found


def gauges(address):
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("sagellm_")}
    return [values[f"sagellm_{n}"] for n in ("running_sequences", "waiting_sequences", "kv_blocks_used")]


def test_64_streams_of_which_a_third_goes_away(address, text_checkpoint):
    """More than run at once: some wait for a row. Those that stay get what they would have got alone."""
    draw = random.Random(1)
    bodies = [
        {"model": "m", "prompt": PROMPTS[i % 5], "max_tokens": draw.randint(1, 60), "ignore_eos": True,
         "stream": True, **({"temperature": 1.1, "seed": i} if i % 2 else {"temperature": 0})}
        for i in range(STREAMS)
    ]  # fmt: skip
    leave = {i: draw.randint(0, 5) for i in draw.sample(range(STREAMS), STREAMS // 3)}

    async def read(client, i):
        text, reason = "", None
        async with client.stream("POST", f"{address}/v1/completions", json=bodies[i]) as answer:
            assert answer.status_code == 200
            chunks = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                (choice,) = json.loads(line[6:])["choices"]
                text, reason, chunks = text + choice["text"], choice["finish_reason"], chunks + 1
                if chunks > leave.get(i, 1000):
                    return None
        return text, reason

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            return await asyncio.gather(*(read(client, i) for i in range(STREAMS)))

    read_texts = asyncio.run(all_of_them())
    with SageLLMEngine(str(text_checkpoint)) as engine:
        for i, (body, got) in enumerate(zip(bodies, read_texts)):
            if i in leave and got is None:
                continue
            how = SamplingParams(
                max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body.get("seed"),
                ignore_eos=True,
            )  # fmt: skip
            assert got == (engine.generate([body["prompt"]], how)[0].text, "length"), i
    end = time.monotonic() + 60
    while gauges(address) != [0, 0, 0]:
        assert time.monotonic() < end, gauges(address)
        time.sleep(0.05)
    more = httpx.post(f"{address}/v1/completions", json=bodies[0] | {"stream": False, "n": 16}, timeout=60)
    assert len(more.json()["choices"]) == 16  # every row is free again


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "-", maxRetries: 0 });
const messages = [{ role: "user", content: "The quick" }];
const asked = { model: "m", messages, max_tokens: 12, temperature: 0 };
const whole = await client.chat.completions.create(asked);
let text = "", reason = null, usage = null;
for await (const chunk of await client.chat.completions.create(
    { ...asked, stream: true, stream_options: { include_usage: true } })) {
  for (const choice of chunk.choices) {
    text += choice.delta.content ?? "";
    reason = choice.finish_reason ?? reason;
  }
  usage = chunk.usage ?? usage;
}
console.log(JSON.stringify({ whole: whole.choices[0].message.content, text, reason, usage }));
"""


def test_the_client_of_node_streams_a_chat(address, tmp_path):
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        pytest.skip("there is no npm or no node on this machine")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "openai"]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install openai takes more than two minutes here")
    if done.returncode:
        pytest.skip(f"npm cannot install openai here: {(done.stderr or done.stdout).strip()[:200]}")
    script = tmp_path / "chat.mjs"
    script.write_text(SCRIPT)
    told = subprocess.run([node, str(script), address], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["text"] == found["whole"] and found["reason"] in ("length", "stop")
    assert found["usage"]["completion_tokens"] > 0
