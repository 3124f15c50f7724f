"""The official client finds what it expects."""

import httpx
import openai
import pytest
from serving import within

from sagellm.batch import SamplingParams
from sagellm.engine.engine import SageLLMEngine
from sagellm.server.config import ServerConfig

KEY = "sk-test"
HI = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "model": "toy"}


@pytest.fixture(scope="module")
def address():
    config = ServerConfig(port=0, api_keys=(KEY,), served_model_name="toy", max_body_bytes=100_000)
    with within("builtin", config, dtype="float32", max_queue=20) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine():
    with SageLLMEngine("builtin", dtype="float32") as engine:
        yield engine


def auth(key):
    return {"Authorization": f"Bearer {key}"}


def post(address, content):
    return httpx.post(f"{address}/v1/completions", content=content, headers=auth(KEY), timeout=60)


def greedy(engine, prompt, tokens, **how):
    return engine.generate([prompt], SamplingParams(max_tokens=tokens, **how))[0]


# chats


def test_a_chat_is_what_the_engine_says(client, engine):
    said = client.chat.completions.create(messages=HI, max_tokens=12, **GREEDY)
    alone = greedy(engine, engine.chat_prompt(HI), 12)
    (choice,) = said.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert choice.finish_reason == alone.finish_reason and choice.logprobs is None
    assert said.object == "chat.completion" and said.model == "toy" and said.id.startswith("chatcmpl-")
    assert said.usage.prompt_tokens == len(engine.chat_prompt(HI))
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_a_streamed_chat_is_the_whole_one_in_pieces(client):
    whole = client.chat.completions.create(messages=HI, max_completion_tokens=12, n=2, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=HI, max_tokens=12, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert choice.index not in reasons
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_text_may_come_in_parts_and_names_may_be_null(client):
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
            "name": None,
        }
    ]
    whole = [{"role": "user", "content": "Hello"}]
    one, other = (client.chat.completions.create(messages=m, max_tokens=6, **GREEDY) for m in (parts, whole))
    assert one.choices[0].message.content == other.choices[0].message.content


def test_logprobs_of_a_chat(client):
    said = client.chat.completions.create(messages=HI, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY)
    content = said.choices[0].logprobs.content
    assert len(content) == said.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
    assert "".join(e.token for e in content).startswith(said.choices[0].message.content)


# completions


def test_prompts_are_texts_or_tokens_one_or_many(client, engine):
    texts = ["Once upon a time", "The sun"]
    ids = [engine.encode(text) for text in texts]
    expected = [greedy(engine, text, 6).text for text in texts]
    for prompt, wanted in (
        (texts, expected),
        (ids, expected),
        (texts[0], expected[:1]),
        (ids[0], expected[:1]),
    ):
        made = client.completions.create(prompt=prompt, max_tokens=6, **GREEDY)
        assert [(c.index, c.text) for c in made.choices] == list(enumerate(wanted))
    assert made.usage.prompt_tokens == len(ids[0])


def test_a_stream_of_several_prompts_has_the_choices_of_all(client):
    how = {"prompt": ["Once upon a time", "The sun"], "n": 2, "max_tokens": 6, **GREEDY}
    whole = client.completions.create(**how)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(stream=True, **how):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {c.index: c.text for c in whole.choices}


def test_an_echo_with_logprobs_has_those_of_the_prompt(client, engine):
    ids = engine.encode("Once upon a time")
    made = client.completions.create(prompt="Once upon a time", echo=True, logprobs=2, max_tokens=3, **GREEDY)
    alone = greedy(engine, ids, 3, prompt_logprobs=2, logprobs=2)
    choice = made.choices[0]
    assert choice.text == "Once upon a time" + alone.text
    assert choice.logprobs.token_logprobs[0] is None
    expected = [p[0] for p in alone.prompt_logprobs[1:]] + alone.logprobs
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for at, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens):
        assert choice.text[at : at + len(token)] == token
    only = client.completions.create(prompt="Once upon a time", echo=True, logprobs=1, max_tokens=0, **GREEDY)
    assert only.choices[0].text == "Once upon a time" and only.usage.completion_tokens == 0
    assert len(only.choices[0].logprobs.tokens) == len(ids)


def test_stop_strings_end_the_text_before_them(client):
    free = client.completions.create(prompt="Once upon a time", max_tokens=12, **GREEDY).choices[0].text
    stop = free[5:9]
    cut = client.completions.create(
        prompt="Once upon a time", max_tokens=12, stop=[stop, "\0"], **GREEDY
    ).choices[0]
    assert cut.text == free[: free.index(stop)] and cut.finish_reason == "stop"
    assert cut.stop_reason == stop


def test_a_seed_says_what_is_drawn_and_a_bias_forbids(client, engine):
    def drawn(**how):
        return client.completions.create(model="toy", prompt="The", max_tokens=8, **how).choices[0].text

    assert drawn(seed=5) == drawn(seed=5) != drawn(seed=6)
    assert drawn(seed=-1) == drawn(seed=-1)
    (first,) = greedy(engine, "The", 1).token_ids
    banned = client.completions.create(prompt="The", max_tokens=1, logit_bias={str(first): -100}, **GREEDY)
    assert banned.choices[0].text != greedy(engine, "The", 1).text


def test_what_users_of_vllm_send_besides(client):
    more = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.05, "min_tokens": 3, "ignore_eos": True,
            "stop_token_ids": [7], "cache_salt": "me", "priority": 2, "prompt_logprobs": 1}  # fmt: skip
    made = client.completions.create(model="toy", prompt="The sun", max_tokens=4, extra_body=more)
    assert made.choices[0].finish_reason in ("length", "stop")
    assert len(made.choices[0].prompt_logprobs) == made.usage.prompt_tokens


# the rest of the face


def test_models_and_tokens(client, address, engine):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("toy", "sagellm")
    with httpx.Client(base_url=address, headers=auth(KEY), timeout=60) as http:
        tokens = http.post("/tokenize", json={"prompt": "Once upon"}).json()
        assert tokens["tokens"] == engine.encode("Once upon") and tokens["count"] == len(tokens["tokens"])
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "Once upon"}
        assert http.get("/info").json()["kv_schema"]["dtype"] == "float32"
        assert "sagellm_generated_tokens_total" in http.get("/metrics").text
        answer = http.get("/version", headers={"X-Request-ID": "mine"})
        assert answer.json()["version"] and answer.headers["X-Request-ID"] == "mine"


# what is refused


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"n": 0}, "n", "n is 0"),
        ({"n": 1000}, "n", "n is 1000"),
        ({"max_tokens": "5"}, "max_tokens", 'max_tokens is "5"'),
        ({"stop": ["x"] * 100}, "stop", "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "logit_bias.1 is 101"),
        ({"top_logprobs": 2}, None, "top_logprobs: accepted: only with logprobs"),
        ({"audio": {}}, "audio", "this server does not support it"),
        ({"nonsense": 1}, "nonsense", "unknown parameter 'nonsense'"),
        ({"messages": []}, "messages", "messages is []"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0", "needs some"),
        ({"min_tokens": 9, "max_tokens": 5}, None, "min_tokens is 9"),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, None, "tokens; accepted: at most"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(client, body, param, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "toy", "messages": HI}, extra_body=body)
    error = refused.value.body
    assert (
        message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    )


def test_errors_are_of_the_kind_that_the_client_knows(client, address):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
    for raw in (
        b"{",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 90000,
        b'{"prompt": "\\ud800", "model": "toy"}',
        b"null",
    ):
        answer = post(address, raw)
        assert answer.status_code == 400, raw
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert post(address, b"x" * 100001).status_code == 413
    assert post(address, iter([b"x" * 60000] * 2)).status_code == 413
    with httpx.Client(base_url=address, timeout=60) as http:
        assert http.get("/nowhere", headers=auth(KEY)).status_code == 404
        assert http.get("/health").status_code == 200, "it needs no key"
        for route in ("/v1/models", "/metrics", "/info", "/ready", "/openapi.json", "/version"):
            assert http.get(route).status_code == 401, route


def test_a_full_queue_says_when_to_come_again(client):
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(prompt=["x"] * 100, max_tokens=2, n=2, **GREEDY)
    assert full.value.response.headers["Retry-After"] == "1" and full.value.code == "queue_full"
    assert client.completions.create(prompt="x", max_tokens=2, **GREEDY).usage.completion_tokens <= 2


def test_a_refusal_comes_before_a_stream_begins(client):
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        client.completions.create(prompt=[5] * 5000, stream=True, **GREEDY)
