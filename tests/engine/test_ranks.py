"""A model divided among two processes answers as one does, and goes on when one of the two is killed."""

import numpy as np
import psutil
import pytest
import torch
from checkpoints import make_core, random_tokens, serve, tokens_of

from sagellm import SageLLMEngine
from sagellm.batch import SamplingParams
from sagellm.engine.core import EngineCore
from sagellm.errors import UserError
from sagellm.passes.shard import weight_bytes

pytest_plugins = ["checkpoints"]

TOLERANCE = 1e-4
BEGINNING = random_tokens(21, 1)
PROMPTS = [
    random_tokens(1, 2),
    random_tokens(30, 3),
    BEGINNING + random_tokens(5, 4),
    BEGINNING + random_tokens(9, 5),
]

FAMILIES = {
    "llama, tied, biases, one KV head on both ranks": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral, window": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
}


SETTINGS = {
    "mistral, window": {"pipeline": "shard"},
    "qwen2": {"host_kv_gib": 0.01},
}
"""For memory that can be counted as nothing is packed, and for blocks that leave the device."""


@pytest.fixture(scope="module")
def pair(checkpoint):
    """`pair(family)`: a core of one rank and a core of two, kept for this module's tests."""
    made: dict[str, tuple[EngineCore, EngineCore]] = {}

    def make(family):
        if family not in made:
            architecture, fields = FAMILIES[family]
            settings = {"max_batched_tokens": 32, **SETTINGS.get(family, {})}
            folder = checkpoint(architecture, **fields)
            made[family] = make_core(folder, **settings), make_core(folder, tensor_parallel=2, **settings)
        return made[family]

    yield make
    for _, two in made.values():
        two.close()


def with_logits(core):
    """Tokens and logits of the prompts, served together, some of them in chunks."""
    logits, execute = {}, core.execute

    def recording(batch):
        outcome = execute(batch)
        for row, one in zip(outcome.rows.tolist(), outcome.logits):
            logits.setdefault(core.scheduler.sequences[row].request.id, []).append(one.clone())
        return outcome

    core.execute = recording
    tokens = tokens_of(serve(core, PROMPTS, SamplingParams(max_tokens=12)))
    core.execute = execute
    return tokens, [torch.stack(logits[f"prompt {i}"]) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_tokens_and_logits_of_one(pair, family):
    one, two = pair(family)
    expected, logits = with_logits(one)
    tokens, ours = with_logits(two)
    assert tokens == expected
    for mine, other in zip(ours, logits):
        torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0)
    whole, held = (weight_bytes(core.compiler.model(("prefill",)).graph) for core in (one, two))
    assert 0.5 < held / whole < 0.6


def test_a_rank_holds_half_of_the_bytes(pair):
    """Counted in memory, where nothing is packed: what the weights program says, and half of the KV cache."""
    _, core = pair("mistral, window")
    (layers,) = (value for name, value in vars(core.weights).items() if name.startswith("layers"))
    held = sum(t.nbytes for w in (core.weights.embed, core.weights.head, *layers) for t in vars(w).values())
    assert held == weight_bytes(core.compiler.model(("prefill",)).graph)
    assert core.rank_schema.bytes_per_block * 2 == core.kv_schema.bytes_per_block


@pytest.mark.parametrize("family", [*FAMILIES][:2])
def test_the_cache_is_read_and_written_whole(pair, family):
    """Both where each rank has KV heads of its own and where both have the same."""
    _, core = pair(family)
    blocks, copies = np.array([3, 1, 5]), np.array([2, 4, 6])
    values = torch.randn(core.cache.read(blocks).shape, generator=torch.Generator().manual_seed(0))
    assert values.shape[4] == core.model.num_kv_heads
    core.cache.write(blocks, values)
    core.cache.copy(blocks, copies)
    core.cache.clear(blocks[:1])
    assert torch.equal(core.cache.read(copies), values)
    assert torch.equal(core.cache.read(blocks)[1:], values[1:])
    assert not core.cache.read(blocks)[0].any()


def test_swapping_and_copies_before_writes_happen_on_all_ranks(pair):
    """Too little memory for all at once, and samples that part from one prompt."""
    how = SamplingParams(max_tokens=24, n=2, temperature=0.8, seed=5)
    prompts, found = [random_tokens(40, seed) for seed in range(6)], []
    for core in pair("qwen2"):
        pool = core.kv.pool
        core.kv.reset()
        taken = pool.take(pool.total - pool.used - 24)
        found.append([sorted((e.sample, e.index, e.token) for e in one) for one in serve(core, prompts, how)])
        pool.release(taken)
        stats = core.stats()
        assert stats.preemptions and stats.copied_blocks and stats.offloaded_blocks and stats.fetched
    assert found[0] == found[1]


@pytest.mark.parametrize("core", ["inline", "process"])
def test_a_killed_rank_costs_a_pause_and_no_token(text_checkpoint, core):
    settings = {"dtype": "float32", "max_sequences": 4, "max_length": 200}
    how = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.7, seed=3)
    with SageLLMEngine(text_checkpoint, **settings) as one:
        (expected,) = one.generate(["The fox"], how)
    with SageLLMEngine(text_checkpoint, core=core, tensor_parallel=2, **settings) as engine:
        stream = engine.stream("The fox", how)
        for event in stream:
            if event.index == 5:
                (rank,) = other_ranks(engine, core)
                rank.kill()
        assert stream.result.token_ids == expected.token_ids
        assert engine.stats().restarts == 1
        ranks = other_ranks(engine, core)
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert len(gone) == 1 and not alive


def other_ranks(engine, core):
    if core == "inline":
        return [psutil.Process(process.pid) for process in engine.core.ranks.processes]
    return psutil.Process(engine.front.link.process.pid).children()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline": "kernel-fusion"}, "tensor_parallel is 2 and the pipeline has no pass shard"),
        ({"pipeline": "shard{ranks=4}"}, "tensor_parallel is 2 and the pipeline divides among 4 ranks"),
        ({"pipeline": "kernel-fusion,shard"}, "accepted: shard before kernel-fusion and pack-weights"),
        ({"record": "steps"}, "record is set and tensor_parallel is 2; accepted: steps of 1 rank"),
        ({"tensor_parallel": 7}, "has 300 rows of the vocabulary for 7 ranks; .* divides 300"),
    ],
)
def test_what_ranks_cannot_do_is_one_line(checkpoint, settings, message):
    with pytest.raises(UserError, match=message) as error:
        make_core(checkpoint("LlamaForCausalLM"), **{"tensor_parallel": 2, **settings})
    assert "\n" not in str(error.value)
