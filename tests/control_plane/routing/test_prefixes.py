"""What counts as the same beginning, and what is remembered of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.bench.host import calls
from sagellm.control_plane.routing import prefixes
from sagellm.control_plane.routing.ask import ask_of
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.control_plane.routing.prefixes import PrefixTable, chunks_of, read_prompt
from sagellm.control_plane.types import RequestMetadata, RequestType

pytestmark = pytest.mark.contract

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def shared(one, two) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def chat(*texts, **more):
    roles = ("system", "user", "assistant")
    return {"model": "m", "messages": [{"role": r, "content": t} for r, t in zip(roles, texts)], **more}


def test_a_conversation_begins_like_its_earlier_turns():
    first = chunks_of(CHAT, chat("s" * 600, "u" * 600))
    later = chunks_of(CHAT, chat("s" * 600, "u" * 600, "a" * 600))
    other = chunks_of(CHAT, chat("s" * 600, "v" * 600))
    assert len(first) == 4 and shared(first, later) == 4 and len(later) > 6
    assert shared(first, other) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"cache_salt": "tenant"},
        {"tools": [{"type": "function", "function": {"name": "f" * 300}}]},
    ],
)
def test_model_salt_and_tools_are_in_front(change):
    body = chat("s" * 600, "u" * 600)
    assert shared(chunks_of(CHAT, body), chunks_of(CHAT, body | change)) == 0
    assert chunks_of(CHAT, body | change) == chunks_of(CHAT, body | change)


def test_prompts_of_text_and_of_token_ids():
    text = read_prompt(TEXT, {"prompt": "x" * 1000})
    assert (len(text.chunks), text.tokens, text.least) == (3, 250, 125)
    ids = read_prompt(TEXT, {"prompt": list(range(200))})
    assert (len(ids.chunks), ids.tokens, ids.least) == (3, 200, 200)
    assert shared(ids.chunks, chunks_of(TEXT, {"prompt": [*range(100), *range(500, 600)]})) == 1
    several = read_prompt(TEXT, {"prompt": ["x" * 1000, "y" * 400]})
    assert several.chunks == text.chunks and several.tokens == 350


def test_what_clients_send_besides_plain_text_does_no_harm():
    parts = [{"type": "text", "text": "你好" * 200}, {"type": "image_url", "image_url": {"url": "u"}}]
    body = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]}
    assert chunks_of(CHAT, body)
    for path, body in (
        (CHAT, {}),
        (TEXT, {}),
        (TEXT, {"prompt": ""}),
        (TEXT, {"prompt": []}),
        (TEXT, {"prompt": "\ud800"}),
    ):
        prompt = read_prompt(path, body)
        assert prompt.chunks == () and prompt.tokens == prompt.least == 1
    assert read_prompt(EMBED, {"input": ["x" * 400, "y" * 800]}) == ((), 200, 100)


json = st.recursive(
    st.sampled_from([None, True, 7, -(2**70), 0.5, "", "x" * 600, "\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.fixed_dictionaries({"content": inner}),
    max_leaves=4,
)
fields = st.sampled_from(["model", "messages", "prompt", "input", "tools", "cache_salt", "logprobs"])


@examples(40)
@given(st.sampled_from([CHAT, TEXT, EMBED]), st.dictionaries(fields, json, max_size=3))
def test_no_body_is_too_strange_to_be_read(path, body):
    """It is the engine that refuses it, in words of its own."""
    prompt = ask_of(path, body, RequestMetadata())
    assert prompt.prompt_tokens >= prompt.least_tokens >= 1
    assert ask_of(path, body, RequestMetadata()).chunks == prompt.chunks


def test_an_ask_is_read_from_body_and_metadata():
    meta = RequestMetadata(
        request_id="r",
        model_name="m",
        max_tokens=5,
        slo_deadline_ms=100,
        tags={"a": "b"},
        parallelism_hint=2,
        preferred_instance_id="e",
        priority="high",
    )
    ask = ask_of(CHAT, chat("s" * 600, tools=[{"type": "function"}]), meta)
    assert ask.kind is RequestType.LLM_CHAT and ask.features == {"chat", "tools"}
    assert (ask.request_id, ask.model, ask.max_tokens, ask.deadline_ms) == ("r", "m", 5, 100)
    assert (ask.tags, ask.ranks, ask.preferred, ask.priority.name) == ({"a": "b"}, 2, "e", "HIGH")
    assert len(ask.chunks) == 2 and ask.prompt_tokens > 150


class Plain:
    """As the table, row by row."""

    def __init__(self):
        self.seen: dict[int, list] = {}

    def saw(self, row, chunks, most):
        kept = [chunk for chunk in self.seen.get(row, []) if chunk not in chunks] + list(reversed(chunks))
        self.seen[row] = kept[max(0, len(kept) - most) :]

    def depth(self, row, chunks):
        known = self.seen.get(row, [])
        return next((at for at, chunk in enumerate(chunks) if chunk not in known), len(chunks))


chains = st.lists(st.integers(0, 2), max_size=6).map(
    lambda path: tuple(tuple(path[: n + 1]) for n in range(len(path)))
)


@examples(40)
@given(
    st.lists(st.tuples(st.sampled_from(["saw", "saw", "forget"]), st.integers(0, 8), chains), max_size=30),
    chains,
)
def test_the_table_is_a_memory_of_the_last_chunks_of_each_row(events, asked):
    table, plain, most = PrefixTable(), Plain(), 7
    for row in range(9):
        table.bound(row, most)
    for what, row, chunks in events:
        if what == "saw":
            table.saw(row, chunks)
            plain.saw(row, chunks, most)
        else:
            table.forget(row)
            plain.seen.pop(row, None)
    depths = table.match(asked, 9)
    assert depths.tolist() == [plain.depth(row, asked) for row in range(9)]
    assert [table.depth(row, asked) for row in range(9)] == depths.tolist()
    assert len(table) == len({chunk for kept in plain.seen.values() for chunk in kept})


def test_what_is_remembered_is_bounded_by_the_cache_and_beginnings_stay_longest():
    fleet = Fleet()
    row = fleet.add("a", model_id="m", kv_tokens=10 * prefixes.CHUNK)
    fleet.prefixes.saw(row, range(8))
    fleet.prefixes.saw(row, (*range(4), *range(100, 104)))
    assert len(fleet.prefixes) == 10
    assert fleet.prefixes.depth(row, range(8)) == 6
    fleet.lost_cache("a")
    assert len(fleet.prefixes) == 0


def test_a_row_used_again_knows_nothing():
    fleet = Fleet()
    row = fleet.add("a", model_id="m")
    fleet.prefixes.saw(row, (1, 2))
    fleet.remove("a")
    assert fleet.add("b", model_id="m") == row
    assert not fleet.prefixes.match((1, 2), len(fleet.columns)).any()


def test_matching_and_noting_a_chunk_take_a_few_calls():
    table, chunks = PrefixTable(), tuple(range(1000))
    for row in range(64):
        table.saw(row, chunks[: 500 + row])
    assert np.array_equal(table.match(chunks, 64), 500.0 + np.arange(64))
    assert calls(lambda: table.match(chunks[:100], 64)) < 110
    assert calls(lambda: table.saw(3, chunks[:100])) < 250
    assert calls(lambda: chunks_of(TEXT, {"prompt": "x" * 25600})) < 350
