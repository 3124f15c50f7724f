"""Vectors of prompts are those of transformers' hidden states, together and among requests that decode."""

import asyncio

import numpy as np
import pytest
import torch
from checkpoints import load_oracle, make_core, random_tokens, save_checkpoint
from strategies import small_model

from sagellm.batch import Request, SamplingParams
from sagellm.engine.base import GenerateRequest
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError
from sagellm.ir.reference import Forwarded, LogicalRows, evaluate_model, evaluate_weights
from sagellm.meaning.inputs import random_tensors
from sagellm.models.decoder import build_embedder, build_model

pytest_plugins = ["checkpoints"]

PROMPTS = [random_tokens(n, n) for n in (1, 5, 40, 40, 17)]
POOL = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "cls": lambda h: h[0]}


@pytest.fixture(scope="module", params=["Qwen2ForCausalLM", "MistralForCausalLM"])
def folder(request, checkpoint):
    return checkpoint(request.param)


def expected(folder, prompt, pooling):
    with torch.no_grad():
        hidden = load_oracle(folder).model(torch.tensor([prompt])).last_hidden_state[0]
    return POOL[pooling](hidden).numpy()


@pytest.mark.parametrize("pooling", POOL)
def test_vectors_are_those_of_transformers(folder, pooling):
    with SageLLMEngine(str(folder), max_sequences=4, max_batched_tokens=48) as engine:
        made = asyncio.run(engine.embed(PROMPTS, pooling, normalize=False))
        for vector, prompt in zip(made, PROMPTS):
            np.testing.assert_allclose(vector, expected(folder, prompt, pooling), atol=2e-5)
        unit = asyncio.run(engine.embed(PROMPTS, pooling))
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
        stats = engine.stats()
        assert stats.kv_blocks_used == stats.running == 0 and stats.finished["stop"] == 10
        assert stats.reused == 0 and stats.shared == 0


def test_prompts_go_together_and_decodes_go_on(folder):
    core = make_core(folder)
    how = SamplingParams(max_tokens=10, ignore_eos=True)
    core.submit(Request("text", PROMPTS[2], how))
    for i in range(4):
        core.submit(Request(f"v{i}", PROMPTS[i], pooling="mean"))
    tokens, vectors = [], 0
    while core.busy:
        events = core.advance()
        tokens += events.tokens.tolist()
        vectors += len(events.vectors)
        assert not (len(events) and events.vectors)
    alone = make_core(folder)
    alone.submit(Request("text", PROMPTS[2], how))
    want = []
    while alone.busy:
        want += alone.advance().tokens.tolist()
    assert tokens == want and vectors == 4
    assert core.counters.steps == alone.counters.steps + 1


def test_the_reference_pools_what_the_model_without_its_head_gives():
    config = small_model()
    rows = LogicalRows((Forwarded(0, range(3), (1, 2, 3), 3, (2,)), Forwarded(1, range(2), (4, 5), 2, (1,))))
    for pooling, pool in POOL.items():
        graph = build_embedder(config, "float32", ("prefill",), pooling)
        graph.verify("full")
        weights = evaluate_weights(graph, random_tensors(graph))
        together = evaluate_model(graph, weights, rows, {}, function=f"embed_{pooling}")
        assert together.shape == (2, config.hidden_size)
        whole = build_model(config, "float32", ("prefill",))
        loaded = evaluate_weights(whole, random_tensors(whole))
        for sequence in rows.sequences:
            seen = []

            def observe(op, layer, results, seen=seen):
                seen.append((op.name, results))

            evaluate_model(whole, loaded, LogicalRows((sequence,)), {}, observe=observe)
            (hidden,) = [r for name, r in seen if name == "nn.repeat"][-1:]
            torch.testing.assert_close(together[sequence.row], pool(hidden[1]))


def test_what_cannot_be_embedded_is_one_line(folder):
    with SageLLMEngine(str(folder), max_batched_tokens=32) as engine:
        for prompt, pooling, message in (
            (PROMPTS[2], "mean", "the prompt has 40 tokens; accepted: at most 32 where its vector is wanted"),
            ([], "mean", "the prompt is empty"),
            ([1], "max", "unknown pooling 'max'; accepted: mean, last, cls"),
            ([1], "", "unknown pooling ''; accepted: mean, last, cls"),
        ):
            with pytest.raises(UserError, match=message):
                asyncio.run(engine.embed([prompt], pooling))


def test_a_core_that_is_lost_gives_the_vector_after_all(folder):
    """As the front asks again: a request with its pooling."""
    with SageLLMEngine(str(folder)) as engine:
        stream = engine.stream(GenerateRequest(prompt=PROMPTS[1], pooling="last"))
        assert stream._journal.as_request().pooling == "last"
        assert stream.wait().embedding is not None


def test_bfloat16_is_pooled_in_float32(tmp_path):
    save_checkpoint(tmp_path, "LlamaForCausalLM", dtype="bfloat16")
    with SageLLMEngine(str(tmp_path)) as engine:
        (vector,) = asyncio.run(engine.embed([PROMPTS[2]], normalize=False))
    assert vector.dtype == np.float32 and np.isfinite(vector).all()
    oracle = load_oracle(tmp_path)
    with torch.no_grad():
        hidden = oracle.model(torch.tensor([PROMPTS[2]])).last_hidden_state[0].mean(0).numpy()
    assert np.dot(hidden, vector) / np.linalg.norm(hidden) / np.linalg.norm(vector) > 0.999
