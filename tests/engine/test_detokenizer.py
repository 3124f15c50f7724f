"""Streamed text equals the decoded whole, shows no half character, and ends before a stop string."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from sagellm.bench.host import calls
from sagellm.engine.detokenizer import Detokenizer
from sagellm.engine.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The end.\n\nThe fox said: no, no, no!",
    "中文分词器把文字切成小块，再变成数字。今天天气很好，我们去公园。",
    "naïve café Ünïcödé — “quotes” … 🙂🙃 👩‍👩‍👧 🇩🇪 ไทย हिन्दी",
    "  def f(x):\n\treturn x  # twice\n\n\n",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it; merges cross characters, so tokens hold parts of two."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.add_tokens(["中文", "two words", "<tool>"])
    return backend


def with_byte_pieces(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def llama() -> tokenizers.Tokenizer:
    """As Llama 2 has it: pieces with ▁ for space, one leading space stripped, bytes where no piece fits."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=SPECIAL, show_progress=False, limit_alphabet=60
    )
    backend.train_from_iterator(TEXTS[:1] * 4 + TEXTS, trainer)
    backend = with_byte_pieces(backend)
    backend.add_tokens(["<tool>", "\ufffd"])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """As older SentencePiece conversions have it: no bytes, the decoder drops the first space itself."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


def mixed() -> tokenizers.Tokenizer:
    """A chain of decoders that is not known by name and holds bytes all the same."""
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return backend


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    made = {}
    for build in (byte_level, llama, metaspace, mixed):
        folder = tmp_path_factory.mktemp(build.__name__)
        build().save(str(folder / "tokenizer.json"))
        made[build.__name__] = Tokenizer.load(folder)
    return made


KINDS = ["byte_level", "llama", "metaspace"]


def stream(tokenizer: Tokenizer, ids: list[int], **options) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*map(detokenizer.push, ids), detokenizer.finish()], detokenizer


def text_before_stop(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> str:
    """As an oracle: decode ever more ids, look at ever more characters, until a stop string is complete."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        for end in range(len(text) + 1):
            met = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
            if met:
                return text[: min(met)]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_streamed_text_of_any_ids_equals_decode(tokenizer_of, kind, data):
    tokenizer = tokenizer_of[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    skip = data.draw(st.booleans())
    shown, detokenizer = stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(shown) == detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200)
@given(data=st.data())
def test_streamed_text_of_bytes_valid_or_not_equals_decode(tokenizer_of, data):
    tokenizer = tokenizer_of["llama"]
    characters = st.one_of(
        st.sampled_from(["é", "中", "🙂", "\n", " ", "\ufffd"]).map(str.encode), st.binary(max_size=3)
    )
    words = st.one_of(characters, st.sampled_from(["▁", "The", "<tool>", "</s>"]))
    ids = []
    for word in data.draw(st.lists(words, max_size=12)):
        pieces = [word] if isinstance(word, str) else [f"<0x{byte:02X}>" for byte in word]
        ids += [i for i in map(tokenizer.token_id, pieces) if i is not None]
    shown, _ = stream(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.text(st.sampled_from("The fox 中文字🙂é\n.▁"), max_size=40))
def test_streamed_text_of_an_encoded_text_equals_decode(tokenizer_of, kind, text):
    tokenizer = tokenizer_of[kind]
    ids = tokenizer.encode(text)
    shown, _ = stream(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_a_decoder_not_known_by_name_streams_whole_characters(tokenizer_of, text):
    tokenizer = tokenizer_of["mixed"]
    ids = tokenizer.encode(text)
    shown, _ = stream(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in shown)


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_half_character_is_shown(tokenizer_of, kind, text):
    tokenizer = tokenizer_of[kind]
    shown, detokenizer = stream(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in part for part in shown)
    assert detokenizer.text == text.removeprefix(" " if kind == "llama" else "")


def test_a_character_is_shown_as_soon_as_it_is_whole(tokenizer_of):
    tokenizer = tokenizer_of["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [by_byte[bytes([byte])] for byte in "é🙂a".encode()]
    assert [detokenizer.push(i) for i in ids] == ["", "é", "", "", "", "🙂", "a"]


def test_bytes_that_never_make_a_character_show_at_the_end(tokenizer_of):
    tokenizer = tokenizer_of["byte_level"]
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    shown, _ = stream(tokenizer, [by_byte[b"a"], by_byte[b"\xe4"], by_byte[b"\xb8"]])
    assert shown == ["a", "", "", "\ufffd"]


# stop strings


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_text_ends_before_the_stop_string_complete_first(tokenizer_of, kind, data):
    tokenizer = tokenizer_of[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    whole = tokenizer.decode(ids)
    places = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 6))
    stops = [whole[at : at + length] for at, length in data.draw(st.lists(places, max_size=3))]
    stops = [stop for stop in stops if stop and "\ufffd" not in stop]
    shown, detokenizer = stream(tokenizer, ids, stop=tuple(stops))
    assert "".join(shown) == detokenizer.text == text_before_stop(tokenizer, ids, stops)
    assert (detokenizer.stopped in stops) == (len(stops) > 0)


def test_what_may_begin_a_stop_string_is_withheld_and_then_given(tokenizer_of):
    tokenizer = tokenizer_of["byte_level"]
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}

    def push_all(text: str, stop: tuple[str, ...]) -> tuple[list[str], Detokenizer]:
        detokenizer = Detokenizer(tokenizer, stop=stop)
        return [detokenizer.push(by_byte[character.encode()]) for character in text], detokenizer

    assert push_all("ab\nUx", ("\nUser",))[0] == ["a", "b", "", "", "\nUx"]
    shown, detokenizer = push_all("ab\nUser:", ("\nUser", "zzz"))
    assert shown == ["a", "b"] + [""] * 6
    assert detokenizer.stopped == "\nUser" and detokenizer.text == "ab" and detokenizer.finish() == ""
    shown, detokenizer = push_all("ab\nUse", ("\nUser",))
    assert detokenizer.finish() == "\nUse" and detokenizer.stopped is None


def test_a_stop_string_across_a_character_and_a_special_token(tokenizer_of):
    tokenizer = tokenizer_of["byte_level"]
    ids = [*tokenizer.encode("今天"), tokenizer.token_id("</s>"), *tokenizer.encode("天气很好")]
    _, detokenizer = stream(tokenizer, ids, stop=("天天气",))
    assert detokenizer.text == "今" and detokenizer.stopped == "天天气"
    _, detokenizer = stream(tokenizer, ids, stop=("</s>",), skip_special_tokens=False)
    assert detokenizer.text == "今天" and detokenizer.stopped == "</s>"


def test_a_stop_string_of_byte_tokens_stops_at_once(tokenizer_of):
    """Llama 2 writes a newline as the byte token <0x0A>; "\\n\\n" must not wait for what comes next."""
    tokenizer = tokenizer_of["llama"]
    newline = tokenizer.token_id("<0x0A>")
    detokenizer = Detokenizer(tokenizer, stop=("\n\n",))
    shown = [detokenizer.push(i) for i in [*tokenizer.encode("The fox"), newline, newline]]
    assert "".join(shown) == "The fox" and detokenizer.stopped == "\n\n"


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@pytest.mark.parametrize("piece", ["The", "bad byte", "newline"])
def test_a_token_costs_the_same_late_as_early(tokenizer_of, monkeypatch, kind, piece):
    tokenizer = tokenizer_of[kind]
    raw = {"The": None, "bad byte": b"\xff", "newline": b"\n"}[piece]
    token = next(
        i
        for i in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(i) == raw or tokenizer.token_text(i) == piece
    )
    detokenizer, decoded = Detokenizer(tokenizer, stop=("\n ",)), []
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **how: decoded.append(len(ids)) or decode(self, ids, **how)
    )

    def cost() -> tuple[int, int]:
        """Of 500 tokens: calls, and ids that the tokenizer was asked to decode."""
        decoded.clear()
        made = calls(lambda: [detokenizer.push(token) for _ in range(500)])
        return made, sum(decoded)

    cost()
    early = cost()
    for _ in range(20_000):
        detokenizer.push(token)
    assert cost() == early
