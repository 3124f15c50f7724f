"""A draft model changes no output; where it is right its guesses hold, where it is not it is soon not asked."""

import json
import random
import shutil

import numpy as np
import pytest
from checkpoints import make_core, random_tokens, save_checkpoint, save_tokenizer, serve, tokens_of

from sagellm.batch import Request, SamplingParams
from sagellm.cli import capture
from sagellm.config import EngineConfig
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.planner import Planner
from sagellm.passes import DEFAULT

pytest_plugins = ["checkpoints"]

PLAIN = DEFAULT.replace("speculative-branching,", "")
EAGER = DEFAULT.replace("speculative-branching", "speculative-branching{gain=0.0}")


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("LlamaForCausalLM")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Other weights, fewer layers, a shorter context."""
    return save_checkpoint(
        tmp_path_factory.mktemp("other"), seed=1, num_hidden_layers=1, max_position_embeddings=64
    )


@pytest.fixture(scope="module")
def plain(folder):
    return make_core(folder, PLAIN, block_size=4, max_length=120)


def drafting(folder, draft, pipeline=EAGER, **settings):
    return make_core(
        folder, pipeline, **{"block_size": 4, "max_length": 120, "draft_model": str(draft), **settings}
    )


def prompts_of(count: int) -> list[list[int]]:
    return [random_tokens(int(5 + seed % 7), seed) for seed in range(count)]


HOWS = [
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=40, temperature=0.8, seed=3),
    SamplingParams(max_tokens=33, temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=5),
    SamplingParams(max_tokens=20, logit_bias={3: 4.0}, min_tokens=4, presence_penalty=0.5, n=2, seed=1),
]


def told(events):
    return [sorted((e.sample, e.index, e.token, e.finish_reason) for e in one) for one in events]


@pytest.mark.parametrize("how", HOWS)
def test_a_model_that_drafts_for_itself_is_always_right(folder, plain, how):
    """Drawn tokens too, as both draw alike."""
    core, prompts = drafting(folder, folder), prompts_of(3)
    assert told(serve(core, prompts, how)) == told(serve(plain, prompts, how))
    stats = core.stats()
    assert stats.accepted == stats.drafted > 40 and stats.draft_steps > 0
    assert stats.steps < 0.6 * how.max_tokens


@pytest.mark.parametrize("how", HOWS)
def test_a_model_that_guesses_wrong_changes_nothing(folder, plain, other, how):
    core, prompts = drafting(folder, other), prompts_of(6)
    assert told(serve(core, prompts, how)) == told(serve(plain, prompts, how))
    stats = core.stats()
    assert stats.drafted > stats.accepted and stats.draft_steps > 0


def test_a_model_that_guesses_wrong_is_soon_not_asked_any_more(folder, plain, other):
    """What is tried costs little; a model as large as its own drafter cannot pay either."""
    core, how = drafting(folder, other, DEFAULT), SamplingParams(max_tokens=100)
    expected, outputs, steps = [], [], []
    for prompt in prompts_of(8):
        expected += tokens_of(serve(plain, [prompt], how))
        outputs += tokens_of(serve(core, [prompt], how))
        steps.append((core.stats().draft_steps, core.stats().steps))
    assert outputs == expected
    drafts, all_steps = np.subtract(steps[-1], steps[3])
    assert drafts <= 0.04 * all_steps


def test_guesses_of_a_batch_that_comes_and_goes(folder, plain, monkeypatch):
    """Sequences are put back and dropped, rows go to others, the drafter's cache is too small for all."""
    monkeypatch.setattr(Planner, "_block_count", lambda planner: 41)
    core = drafting(folder, folder, max_batched_tokens=16)
    how, draw = SamplingParams(max_tokens=40), random.Random(1)
    prompts = prompts_of(14)
    for number, prompt in enumerate(prompts):
        core.submit(Request(str(number), prompt, how))
    outputs, dropped = {str(number): [] for number in range(len(prompts))}, set()
    while core.busy:
        for event in core.step():
            outputs[event.request_id].append(event.token)
        if draw.random() < 0.15 and core.scheduler.running > 1:
            core.scheduler.preempt(draw.choice(core.scheduler._running[1:].tolist()))
        if draw.random() < 0.03 and core.abort(name := str(draw.randrange(14))):
            dropped.add(name)
    expected = tokens_of(serve(plain, prompts, how))
    for number, wanted in enumerate(expected):
        got = outputs[str(number)]
        assert got == (wanted[: len(got)] if str(number) in dropped else wanted)
    stats = core.stats()
    assert stats.accepted > 50 and stats.preemptions > 3 and stats.kv_blocks_used == 0 and dropped
    held = core.drafter.columns.owned.sum()
    assert core.drafter._pool.used == held <= core.drafter._pool.total


def test_guesses_from_text_and_from_the_model_stand_side_by_side(folder, plain, other):
    core = drafting(folder, other)
    loop = [7, 8, 9, 10] * 6
    prompts = [loop, *prompts_of(3)]
    for _ in range(2):
        assert tokens_of(serve(core, prompts, SamplingParams(max_tokens=60))) == tokens_of(
            serve(plain, prompts, SamplingParams(max_tokens=60))
        )
    assert core.stats().accepted > 100


def test_another_request_finds_nothing_in_the_drafter(folder):
    """The same prompt again, in the same row, for another tenant: it is computed anew."""
    core, prompt, row = drafting(folder, folder, max_sequences=1), random_tokens(30, 1), np.array([0])
    for salt in ("one", "other"):
        core.submit(Request("a", prompt, SamplingParams(max_tokens=4), salt=salt))
        core.step()
        assert core.drafter.behind(row) == [30]
        core.step()
        assert core.drafter.columns.context[0] >= 30
        while core.busy:
            core.step()


def test_stop_strings_end_a_text_in_the_middle_of_what_was_guessed():
    with SageLLMEngine(
        "builtin", dtype="float32", pipeline=EAGER, max_length=256, draft_model="builtin"
    ) as engine:
        (free,) = engine.generate(["Once upon a time"], SamplingParams(max_tokens=40))
        for at in (9, 25):
            how = SamplingParams(max_tokens=40, stop=free.text[at : at + 3])
            (one,) = engine.generate(["Once upon a time"], how)
            assert one.text == free.text[: free.text.index(free.text[at : at + 3])]
            assert one.finish_reason == "stop"
        assert engine.stats().accepted > 30


# what is refused


def refused(*arguments) -> str:
    code, _, err = capture(list(arguments))
    assert code != 0 and len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize("command", ["run", "compile"])
def test_what_cannot_draft_is_refused_before_weights_are_read(command, folder, tmp_path):
    given = ["-m", str(folder), "--draft-model"]
    (tmp_path / "prompts").write_text("1 2 3\n")
    start = [command, *(["--prompts", str(tmp_path / "prompts")] if command == "compile" else ["hello"])]
    small = save_checkpoint(tmp_path / "small", vocab_size=200, num_hidden_layers=1)
    (small / "model.safetensors").write_bytes(b"no weights")
    assert "has 200 tokens" in refused(*start, *given, str(small))
    assert "no such folder" in refused(*start, *given, str(tmp_path / "nowhere"))
    assert "lacks speculative-branching" in refused(*start, *given, str(folder), "-p", "cleanup")


def test_another_tokenizer_is_refused(text_checkpoint, tmp_path):
    shutil.copytree(text_checkpoint, tmp_path / "draft")
    save_tokenizer(tmp_path / "draft")
    Planner(EngineConfig(model=str(text_checkpoint), draft_model=str(tmp_path / "draft")))
    file = tmp_path / "draft" / "tokenizer.json"
    known = json.loads(file.read_text())
    pairs = list(known["model"]["vocab"].items())
    known["model"]["vocab"] |= {pairs[7][0]: pairs[8][1], pairs[8][0]: pairs[7][1]}
    file.write_text(json.dumps(known))
    assert f"another tokenizer: token {pairs[7][1]} is not the same" in refused(
        "run", "-m", str(text_checkpoint), "--draft-model", str(tmp_path / "draft"), "hello"
    )
