"""Whatever shares a step with it, a request gets the same tokens; nothing is computed twice, nothing is left behind."""

import asyncio

import pytest
import torch
from checkpoints import RECITED, make_core, random_tokens, serve, tokens_of

from sagellm.batch import Request, SamplingParams
from sagellm.bench.host import calls
from sagellm.engine import planner
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.planner import Planner
from sagellm.errors import UserError

pytest_plugins = ["checkpoints"]

BEGINNING = random_tokens(21, 1)
PROMPTS = [
    random_tokens(1, 2),
    random_tokens(9, 3),
    BEGINNING,
    BEGINNING + random_tokens(8, 4),
    random_tokens(40, 5),
    BEGINNING,
    BEGINNING[:16] + random_tokens(3, 6),
    random_tokens(17, 7),
    BEGINNING + random_tokens(30, 8),
    random_tokens(16, 9),
]
HOW = SamplingParams(max_tokens=12, logprobs=0)

LLAMA = ("LlamaForCausalLM", {})
MISTRAL = ("MistralForCausalLM", {"sliding_window": 8})
QWEN2 = ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1})
QWEN3 = ("Qwen3ForCausalLM", {})
DYNAMIC = (
    "LlamaForCausalLM",
    {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
)
"""Its keys depend on how long the sequence is, beyond 24 tokens."""
FAMILIES = pytest.mark.parametrize(
    "family", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=["llama", "mistral", "qwen2", "qwen3"]
)


@pytest.fixture(scope="module")
def alone(checkpoint):
    """`alone(family)`: folder, and the events of each prompt when it is the only one."""
    known = {}

    def ask(family):
        if str(family) not in known:
            folder = checkpoint(family[0], **family[1])
            core = make_core(folder)
            known[str(family)] = folder, [serve(core, [prompt], HOW)[0] for prompt in PROMPTS]
        return known[str(family)]

    return ask


def assert_equal(some, others):
    """Equal tokens, and logprobs equal up to the rounding of sums that are cut otherwise."""
    assert tokens_of(some) == tokens_of(others)
    for one, other in zip(some, others):
        assert [event.logprob for event in one] == pytest.approx([event.logprob for event in other], abs=1e-4)


def assert_all_free(core):
    assert not core.busy
    assert core.kv.pool.used == 0
    assert core.kv.pool.references[1:].sum() == 0
    assert len(core.scheduler._free) == core.columns.capacity
    assert core.step() == []


# who shares a step with whom


@pytest.mark.parametrize(
    "family",
    [LLAMA, MISTRAL, QWEN2, QWEN3, DYNAMIC],
    ids=["llama", "mistral", "qwen2", "qwen3", "dynamic rope"],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_sequences": 16},
        {"pipeline": ""},
        {"max_sequences": 3},
        {"max_batched_tokens": 7},
        {"max_batched_tokens": 1, "max_sequences": 4},
        {"max_batched_tokens": 50, "pipeline": ""},
        {"block_size": 32},
        {"block_size": 32, "max_batched_tokens": 7},
    ],
    ids=lambda settings: ", ".join(f"{name} {value!r}" for name, value in settings.items()),
)
def test_all_at_once_give_what_each_gives_alone(alone, family, settings):
    folder, expected = alone(family)
    core = make_core(folder, **settings)
    assert_equal(serve(core, PROMPTS, HOW), expected)
    assert_all_free(core)


@pytest.mark.parametrize("blocks", [4, 6, 11])
def test_a_pool_that_holds_few_sequences_lets_the_others_wait(alone, monkeypatch, blocks):
    """All prompts together need 32 blocks, the longest one 4."""
    folder, expected = alone(LLAMA)
    monkeypatch.setattr(Planner, "_block_count", lambda planner: blocks + 1)
    core = make_core(folder)
    assert_equal(serve(core, PROMPTS, HOW), expected)
    assert_all_free(core)


def test_a_pool_is_as_large_as_its_share_of_the_free_memory(alone, monkeypatch):
    folder, expected = alone(LLAMA)
    whole = make_core(folder)
    weights = 4 * whole.parameters
    monkeypatch.setattr(planner, "available_memory", lambda: weights + 80 * whole.kv_schema.bytes_per_block)
    core = make_core(folder, kv_memory_fraction=0.5)
    assert core.kv.pool.free == 40
    assert_equal(serve(core, PROMPTS, HOW), expected)
    with pytest.raises(UserError, match=r"^kv_memory_fraction 1e-12 .* accepted: .*$"):
        make_core(folder, kv_memory_fraction=1e-12)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(checkpoint, monkeypatch):
    monkeypatch.setattr(planner, "available_memory", lambda: 2**17)
    with pytest.raises(
        UserError, match=r"^the weights of .* take 0 MiB in float32, and 0 MiB of memory are free; acc"
    ):
        make_core(checkpoint("LlamaForCausalLM"))


def test_requests_that_come_later_change_nothing_for_those_that_run(alone):
    folder, expected = alone(LLAMA)
    core = make_core(folder)
    events = {str(i): [] for i in range(len(PROMPTS))}
    waiting = list(enumerate(PROMPTS))
    while waiting or core.busy:
        if waiting:
            index, prompt = waiting.pop(0)
            core.submit(Request(str(index), prompt, HOW))
        for event in core.step():
            events[event.request_id].append(event)
    assert_equal(list(events.values()), expected)
    assert_all_free(core)


def test_events_count_the_tokens_and_the_last_one_says_why(alone):
    folder, _ = alone(LLAMA)
    for events in serve(make_core(folder), PROMPTS, HOW):
        assert [event.index for event in events] == list(range(12))
        assert [event.finish_reason for event in events] == [None] * 11 + ["length"]


# ends


@pytest.mark.parametrize("budget", [2048, 7])
@pytest.mark.parametrize("steps", range(6))
def test_an_aborted_request_frees_all_it_has_and_disturbs_nobody(alone, steps, budget):
    """Those that wait, that are in the middle of their prompt, that lead others, that decode."""
    folder, expected = alone(LLAMA)
    core = make_core(folder, max_sequences=6, max_batched_tokens=budget)
    for index, prompt in enumerate(PROMPTS):
        core.submit(Request(str(index), prompt, HOW))
    events = {str(i): [] for i in range(len(PROMPTS))}

    def step():
        for event in core.step():
            events[event.request_id].append(event)

    for _ in range(steps):
        step()
    gone = [1, 2, 8]
    assert [core.abort(str(index)) for index in gone] == [True, True, True]
    assert [core.abort(str(index)) for index in gone] == [False, False, False]
    counts = [len(events[str(index)]) for index in gone]
    while core.busy:
        step()
    assert [len(events[str(index)]) for index in gone] == counts
    staying = [index for index in range(len(PROMPTS)) if index not in gone]
    assert_equal([events[str(i)] for i in staying], [expected[i] for i in staying])
    assert_all_free(core)


def test_a_core_that_was_emptied_by_aborts_serves_on(alone):
    folder, expected = alone(LLAMA)
    core = make_core(folder)
    for index, prompt in enumerate(PROMPTS):
        core.submit(Request(str(index), prompt, HOW))
    core.step()
    for index in range(len(PROMPTS)):
        assert core.abort(str(index))
    assert_all_free(core)
    assert_equal(serve(core, PROMPTS, HOW), expected)


def test_a_prompt_may_fill_the_context_up_to_one_token(checkpoint):
    core = make_core(checkpoint(), max_length=32)
    (events,) = serve(core, [random_tokens(31, 1)], SamplingParams(max_tokens=5))
    assert [event.finish_reason for event in events] == ["length"]
    (events,) = serve(core, [random_tokens(29, 1)], SamplingParams(max_tokens=50))
    assert [event.finish_reason for event in events] == [None, None, "length"]
    assert_all_free(core)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("new", []), "the prompt is empty; accepted: at least one token"),
        (
            Request("new", [1] * 32),
            "the prompt has 32 tokens; accepted: at most 31, as the context is 32",
        ),
        (Request("new", [1, 300]), "token id 300 in the prompt; accepted: 0 to 299"),
        (Request("new", [-1]), "token id -1 in the prompt; accepted: 0 to 299"),
        (Request("running", [1]), "request id 'running' is in use; accepted: a new one"),
        (Request("chunked", [1]), "request id 'chunked' is in use; accepted: a new one"),
        (Request("admitted", [1]), "request id 'admitted' is in use; accepted: a new one"),
        (Request("waiting", [1]), "request id 'waiting' is in use; accepted: a new one"),
    ],
    ids=["empty", "too long", "no such token", "negative token", "running", "chunked", "admitted", "waiting"],
)
def test_what_cannot_run_is_refused_in_one_line_and_nothing_stays_of_it(checkpoint, request_, message):
    core = make_core(checkpoint(), max_length=32, max_sequences=3, max_batched_tokens=8)
    how = SamplingParams(max_tokens=4)
    core.submit(Request("running", [1], how))
    core.step()
    for token, name in enumerate(("chunked", "admitted", "waiting"), 2):
        core.submit(Request(name, [token] * 20, how))
    core.step()
    assert core.columns.context[:3].tolist() == [2, 7, 0]
    before = core.kv.pool.used, core.scheduler.waiting, core.scheduler.running
    with pytest.raises(UserError) as error:
        core.submit(request_)
    assert str(error.value) == message
    assert (core.kv.pool.used, core.scheduler.waiting, core.scheduler.running) == before
    ended = set()
    while core.busy:
        ended |= {event.request_id for event in core.step() if event.finish_reason}
    assert ended == {"running", "chunked", "admitted", "waiting"}
    assert_all_free(core)


def test_a_model_with_fewer_positions_than_asked_for_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"^max_length is 257; accepted: at most 256, the model's context$"):
        make_core(checkpoint(), max_length=257)


# what is computed


def forwarded(core, prompts):
    """Tokens that went through the model for these prompts and no output."""
    before = core.counters.forwarded
    serve(core, prompts, SamplingParams(max_tokens=1))
    return core.counters.forwarded - before


def trie_nodes(prompts):
    return len({tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))})


def test_a_common_beginning_is_forwarded_once(checkpoint):
    folder = checkpoint()
    prompts = [BEGINNING + [1, 2, 3], BEGINNING + [4, 5], random_tokens(13, 5)]
    assert trie_nodes(prompts) == len(BEGINNING) + 3 + 2 + 13
    assert forwarded(make_core(folder), prompts) == len(BEGINNING) + 3 + 2 + 13
    assert forwarded(make_core(folder, ""), prompts) == 2 * len(BEGINNING) + 3 + 2 + 13


def test_each_node_of_the_trie_is_forwarded_once(checkpoint):
    core = make_core(checkpoint(), max_sequences=len(PROMPTS))
    assert forwarded(core, PROMPTS) == trie_nodes(PROMPTS)
    assert core.counters.prompt == sum(map(len, PROMPTS))
    assert core.counters.shared == core.counters.prompt - core.counters.forwarded


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_equal_prompts_are_forwarded_once(checkpoint, count, length):
    core = make_core(checkpoint())
    assert forwarded(core, [random_tokens(length, 1)] * count) == length


def test_sixteen_questions_about_one_text_forward_the_text_once(checkpoint):
    folder = checkpoint(max_position_embeddings=1024)
    text = random_tokens(512, 1)
    prompts = [text + [i] + random_tokens(31, 2) for i in range(16)]
    core = make_core(folder, max_sequences=16)
    assert forwarded(core, prompts) == 512 + 16 * 32
    core = make_core(folder, "", max_sequences=16)
    assert forwarded(core, prompts) == 16 * 544


def test_a_token_that_is_decoded_is_forwarded_once(checkpoint):
    core = make_core(checkpoint())
    serve(core, [random_tokens(10, 1)], SamplingParams(max_tokens=9))
    assert core.counters.forwarded == 10 + 8
    assert core.counters.generated == 9


@pytest.mark.parametrize("rows", [("decode",), ("prefill",), ("decode", "prefill")])
@FAMILIES
def test_kernel_fusion_saves_six_calls_a_layer_and_eight_with_head_norms(checkpoint, family, rows):
    """q, k and v become one product and a split (1 less); gate, up, silu and mul become one product and silu_mul
    (2); each of two norms goes into the add before it (2); rope into the KV write (1), and norms of q and k (2)."""
    folder = checkpoint(family[0], **family[1])
    plain = make_core(folder, "prefix-dedup,cleanup,pack-weights").compiler.model(rows).program.calls
    fused = make_core(folder).compiler.model(rows).program.calls
    layers = [name for name in plain if name.startswith("layers")]
    assert layers
    base = 18 if family is QWEN3 else 16  # Qwen3 has a norm on q and one on k
    assert {name: plain[name] for name in layers} == dict.fromkeys(layers, base)
    assert {name: fused[name] for name in layers} == dict.fromkeys(layers, 10)
    assert {n: c for n, c in plain.items() if n not in layers} == {"model": 0, "embed": 3, "head": 2}
    assert {n: c for n, c in fused.items() if n not in layers} == {"model": 0, "embed": 3, "head": 2}


@FAMILIES
@pytest.mark.parametrize(
    "how", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)], ids=["greedy", "top_p"]
)
def test_a_step_of_64_makes_as_many_calls_as_a_step_of_one(checkpoint, family, how):
    """Calls of the plan, and those of the model's and the sampler's functions that it runs."""
    core = make_core(checkpoint(family[0], **family[1]), max_sequences=64)

    def planned(count):
        for index in range(count):
            core.submit(Request(str(index), [index, 1, 2], how))
        made = []
        for _ in range(2):
            batch = core.schedule()
            plan = core.compiler.step(batch).plan
            static = {name: value for call in plan.calls for name, value in call.static.items()}
            model = core.compiler.model(static["kinds"]).program.calls
            sampler = core.compiler.sampler(static["stages"]).calls
            made.append((len(plan.calls), model, sampler))
            core.execute(batch)
        for index in range(count):
            core.abort(str(index))
        return made

    assert planned(1) == planned(64)


# the cost of a step in Python


@pytest.fixture(scope="module")
def steady(checkpoint):
    """`steady(rows, how)`: a core with so many sequences that begin to decode; the first such step is not compiled."""

    def make(rows, how):
        core = make_core(checkpoint(), max_sequences=rows, max_batched_tokens=4096, max_length=48)
        for index in range(rows):
            core.submit(Request(str(index), [index % 300, index // 300], how))
        core.step()
        return core

    return make


GREEDY = SamplingParams(max_tokens=30)
SAMPLED = SamplingParams(max_tokens=30, temperature=1.0, top_k=9, repetition_penalty=1.1)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_decode_costs_as_many_calls_for_1024_as_for_256(steady, how):
    """Admission, decisions, lowering and look-up: what stands between two steps of steady decode."""

    def costs(core):
        batch, counts = core.schedule(), core.compiler.counts
        before = counts.hits, counts.misses
        miss = calls(lambda: core.compiler.step(batch))
        hit = calls(lambda: core.compiler.step(batch))
        assert (counts.hits, counts.misses) == (before[0] + 1, before[1] + 1)
        assert len(batch.decode) == core.columns.capacity
        return miss, hit, calls(core.schedule)

    (miss, hit, schedule), (large_miss, *large) = (costs(steady(rows, how)) for rows in (256, 1024))
    assert max(miss, large_miss) <= 10_000
    assert [hit, schedule] == large
    assert hit <= 600
    assert schedule <= 80


def test_a_whole_step_without_the_model_costs_as_many_calls_for_1024_as_for_256(steady):
    """As above and with binding, columns, the argmax and commit; the model itself gives constant logits at once."""

    def cost(core):
        rows, functions = core.columns.capacity, core.executor.functions
        logits = torch.zeros(rows, 300)
        core.executor.functions = lambda name, words: (
            (lambda *inputs: logits) if name == "model" else functions(name, words)
        )
        core.step()
        step = calls(lambda: core.execute(core.schedule()))
        assert calls(core.step) - step <= 6 * rows, "an event for each token"
        return step

    assert cost(steady(256, GREEDY)) == cost(steady(1024, GREEDY)) <= 650


# text


def assert_idle(engine):
    stats = engine.stats()  # behind all that was sent before
    assert (stats.running, stats.waiting, stats.kv_blocks_used, engine.front.live) == (0, 0, 0, 0)
    assert_all_free(engine.core)


@pytest.fixture(scope="module")
def engine(text_checkpoint):
    return SageLLMEngine(str(text_checkpoint), max_sequences=4)


def test_the_policy_of_the_kv_cache_can_be_changed_while_running(engine):
    engine.set_kv_policy("lru")
    with pytest.raises(UserError, match="unknown policy 'oldest'"):
        engine.set_kv_policy("oldest")
    engine.set_kv_policy("lifetime")


def test_without_the_pass_there_is_no_policy_to_change(text_checkpoint):
    plain = SageLLMEngine(str(text_checkpoint), max_sequences=4, pipeline="cleanup")
    with plain, pytest.raises(UserError, match="accepted: a pipeline with kv-eviction-placement"):
        plain.set_kv_policy("lru")


@pytest.fixture(scope="module")
def reciter(reciting_checkpoint):
    """It answers `<|assistant|>` with RECITED."""
    return SageLLMEngine(str(reciting_checkpoint), max_sequences=4)


TEXTS = ["The quick brown fox", "中文", "naïve café 🙂", "The quick", "x"]


def test_texts_give_the_decoded_tokens_in_the_order_of_the_prompts(engine):
    results = engine.generate(TEXTS, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len({tuple(result.token_ids) for result in results}) == len(TEXTS)
    for text, result in zip(TEXTS, results):
        assert result.prompt_tokens == len(engine.encode(text))
        assert len(result.token_ids) == 20
        assert result.text == engine.tokenizer.decode(result.token_ids)
        assert result.finish_reason == "length"
        assert result.ttft > 0 and result.tpot > 0
        assert engine.generate(text, SamplingParams(max_tokens=20, ignore_eos=True))[0].text == result.text
    assert_idle(engine)


def test_token_ids_are_as_good_as_text(engine):
    how = SamplingParams(max_tokens=5)
    by_text = engine.generate(TEXTS, how)
    ids = [engine.encode(text) for text in TEXTS]
    assert [r.token_ids for r in engine.generate(ids, how)] == [r.token_ids for r in by_text]
    assert engine.generate(ids[0], how)[0].token_ids == by_text[0].token_ids
    assert engine.generate([], how) == []


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_make_the_generated_text(engine, text):
    how = SamplingParams(max_tokens=25, ignore_eos=True)
    (whole,) = engine.generate(text, how)
    stream = engine.stream(text, how)
    events = list(stream)
    assert "".join(event.text for event in events) == whole.text
    assert [event.ids for event in events] == [(token,) for token in whole.token_ids]
    assert [event.finish_reason for event in events] == [None] * 24 + ["length"]
    assert stream.result.text == whole.text
    assert_idle(engine)


def test_streamed_pieces_never_hold_half_a_character(reciter):
    pieces = [event.text for event in reciter.stream("<|assistant|>", SamplingParams())]
    assert "".join(pieces) == RECITED
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") > 2, "the first bytes of a character wait for its last one"


def test_an_end_token_ends_the_text_and_is_not_shown(reciter):
    (result,) = reciter.generate("<|assistant|>")
    assert (result.text, result.finish_reason) == (RECITED, "stop")
    assert reciter.tokenizer.decode(result.token_ids[-1:], skip_special_tokens=False) == "<|end|>"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("STOP", "aé中文🙂 "),
        (("OP.q", "STOPPED"), "aé中文🙂 ST"),
        ("文🙂", "aé中"),
        ("a", ""),
        ("!", RECITED[:-1]),
        ("!?", RECITED),
        (("TOP", "ST"), "aé中文🙂 "),
    ],
)
def test_a_stop_string_cuts_the_text_before_it(reciter, stop, text):
    how = SamplingParams(stop=stop)
    (result,) = reciter.generate("<|assistant|>", how)
    assert (result.text, result.finish_reason) == (text, "stop")
    pieces = [event.text for event in reciter.stream("<|assistant|>", how)]
    assert "".join(pieces) == text
    assert_idle(reciter)


def test_a_stop_string_ends_one_request_of_several(reciter):
    ids = reciter.encode(f"<|assistant|>{RECITED}")
    behind = next(n for n in range(len(ids)) if reciter.tokenizer.decode(ids[:n]).endswith("文"))
    results = reciter.generate([ids[:1], ids[:behind]], SamplingParams(stop="中文"))
    assert [result.text for result in results] == ["aé", "🙂 STOP.qdz!"]


def test_the_budget_of_tokens_may_end_within_a_character(reciter):
    for count in range(1, 20):
        (result,) = reciter.generate("<|assistant|>", SamplingParams(max_tokens=count, ignore_eos=True))
        assert (len(result.token_ids), result.finish_reason) == (count, "length")
        assert result.text == reciter.tokenizer.decode(result.token_ids)


def test_chat_uses_the_template(reciter, engine):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}]
    prompt = "<|system|>Be brief.<|end|><|user|>The fox?<|end|><|assistant|>"
    assert reciter.chat_prompt(messages) == reciter.tokenizer.encode(prompt)
    assert asyncio.run(reciter.chat(messages)).text == RECITED
    how = SamplingParams(max_tokens=8)
    assert asyncio.run(engine.chat(messages, how)).token_ids == engine.generate(prompt, how)[0].token_ids


def test_two_streams_at_once_give_each_its_own_text(engine):
    how = SamplingParams(max_tokens=10, ignore_eos=True)
    expected = [result.text for result in engine.generate(TEXTS[:2], how)]
    one, other = (engine.stream(text, how) for text in TEXTS[:2])
    texts = ["", ""]
    for left, right in zip(one, other, strict=True):
        texts[0] += left.text
        texts[1] += right.text
    assert texts == expected


def test_a_stream_goes_on_after_others_were_served_in_between(engine):
    how = SamplingParams(max_tokens=10, ignore_eos=True)
    expected = [result.text for result in engine.generate(TEXTS, how)]
    stream = engine.stream(TEXTS[0], how)
    text = next(stream).text
    assert [result.text for result in engine.generate(TEXTS[1:], how)] == expected[1:]
    assert text + "".join(event.text for event in stream) == expected[0]
    assert_idle(engine)


def test_a_stream_that_is_closed_frees_what_it_has(engine):
    stream = engine.stream(TEXTS[0], SamplingParams(max_tokens=50, ignore_eos=True))
    events = [next(stream) for _ in range(3)]
    stream.close()
    assert stream.result.token_ids[:3] == [event.ids[0] for event in events]
    assert stream.result.finish_reason == "abort"
    assert_idle(engine)


def test_samples_of_one_prompt_differ_with_and_without_a_seed(engine):
    for seed in (None, 5):
        how = SamplingParams(max_tokens=8, temperature=1.5, seed=seed)
        results = engine.generate([TEXTS[0]] * 4, how)
        assert len({tuple(result.token_ids) for result in results}) == 4


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "the prompt is empty; accepted: at least one token"),
        (["fine", "", "fine"], "prompt 2 of 3: the prompt is empty; accepted: at least one token"),
        ([[1], [300]], "prompt 2 of 2: token id 300 in the prompt; accepted: 0 to 299"),
        (
            ["fine", [1] * 256],
            "prompt 2 of 2: the prompt has 256 tokens; accepted: at most 255, as the context is 256",
        ),
    ],
)
def test_one_bad_prompt_refuses_all_and_none_is_queued(engine, prompts, message):
    with pytest.raises(UserError) as error:
        engine.generate(prompts)
    assert str(error.value) == message
    assert_idle(engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_sizes": 16}, r"unknown setting 'block_sizes'; accepted: block_size, .*"),
        ({"block_size": 0}, "block_size is 0; accepted: a whole number of at least 1"),
        ({"dtype": "int3"}, "unknown dtype 'int3'; accepted: auto, .*"),
        ({"max_length": 1000}, "max_length is 1000; accepted: at most 256, the model's context"),
        ({"seed": -1}, "seed is -1; accepted: a whole number of at least 0"),
        ({"pipeline": "fusion"}, "unknown pass 'fusion'; accepted: .*"),
        ({"device": "abacus"}, ".*abacus.*accepted: .*"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_one_line(text_checkpoint, settings, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        SageLLMEngine(str(text_checkpoint), **settings)


def test_what_a_block_held_before_cannot_reach_the_next_sequence(checkpoint):
    """One NaN left in a freed block (a float16 overflow, say) must not poison whoever gets the block next."""
    core = make_core(checkpoint())
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    wanted = serve(core, prompts, SamplingParams(max_tokens=8))
    for keys, values in core.cache[0:]:
        keys[1:].fill_(float("nan"))
        values[1:].fill_(float("nan"))
    assert serve(core, prompts, SamplingParams(max_tokens=8)) == wanted
