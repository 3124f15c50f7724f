"""An output that has a grammar is a text of it, whatever else is asked for and whatever happens on the way."""

import json
import re

import pytest
from attrs import evolve
from checkpoints import make_core, save_reciting, save_tokenizer

from sagellm.batch import Request, SamplingParams
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.record import replay
from sagellm.engine.wire import pack, unpacker
from sagellm.errors import UserError
from sagellm.grammar import Grammar

pytest_plugins = ["checkpoints"]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "中文"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
COUNT = re.compile(r"[0-9]{3}(-[a-c]{2}){4}")
GRAMMARS = {
    "regex": (Grammar.regex(COUNT.pattern), lambda text: COUNT.fullmatch(text)),
    "json": (Grammar.json(SCHEMA), lambda text: json.loads(text)["city"] in ("Oslo", "中文")),
    "choice": (Grammar.choice(["yes", "no", 'möglich "so"\n']), ["yes", "no", 'möglich "so"\n'].__contains__),
    "lark": (Grammar.lark('start: pair pair\npair: "(" pair? ")"'), lambda text: balanced(text)),
    "gbnf": (Grammar.gbnf('root ::= "<" [a-z] [a-z] ">"'), lambda text: re.fullmatch("<[a-z]{2}>", text)),
    "before": (
        Grammar("regex", "[0-9]{4}", 'start: "ab" @body'),
        lambda text: re.fullmatch("ab[0-9]{4}", text),
    ),
}
HOWS = [
    {},
    {"temperature": 1.5, "seed": 4, "n": 3},
    {"temperature": 1.0, "seed": 1, "min_tokens": 30},
    {"temperature": 0.9, "seed": 2, "top_k": 5, "top_p": 0.9, "ignore_eos": True, "repetition_penalty": 1.3},
]


def unpack(data):
    reader = unpacker()
    reader.feed(data)
    return next(reader)


def balanced(text):
    while "()" in text:
        text = text.replace("()", "")
    return text == ""


@pytest.fixture(scope="module")
def engine(text_checkpoint):
    with SageLLMEngine(str(text_checkpoint), max_sequences=8) as engine:
        yield engine


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_outputs_are_of_the_grammar(engine, kind, how):
    grammar, fits = GRAMMARS[kind]
    (made,) = engine.generate(["x"], SamplingParams(max_tokens=200, grammar=grammar, **how))
    for output in made.outputs:
        cut_off = kind == "lark" and output.finish_reason == "length"  # its texts have no longest
        assert cut_off or (fits(output.text) and output.finish_reason == "stop"), output


def test_rows_without_a_grammar_stay_as_they_are_and_without_one_there_is_no_stage(text_checkpoint):
    with SageLLMEngine(str(text_checkpoint), max_sequences=8) as engine:
        plain = SamplingParams(max_tokens=15, temperature=1.0, seed=5)
        alone = engine.generate(["The quick"], plain)[0].token_ids
        assert not any("grammar" in stages for stages in engine.core.compiler._samplers)
        bound = SamplingParams(max_tokens=40, grammar=GRAMMARS["regex"][0])
        streams = [engine.stream("The quick", how) for how in (bound, plain, bound, plain)]
        texts = [stream.wait() for stream in streams]
        assert [texts[1].token_ids, texts[3].token_ids] == [alone, alone]
        assert COUNT.fullmatch(texts[0].text) and texts[2].text == texts[0].text
        assert ("grammar", "draw") in engine.core.compiler._samplers
        assert engine.generate(["The quick"], plain)[0].token_ids == alone


def test_an_output_goes_on_after_it_was_put_back(text_checkpoint):
    """With room for little more than one sequence, all the others are put back again and again."""
    how = SamplingParams(max_tokens=120, grammar=GRAMMARS["regex"][0], temperature=1.2, seed=3)
    prompt = list(range(40, 70))
    free = run(make_core(text_checkpoint, block_size=4), prompt, how)
    tight = make_core(text_checkpoint, block_size=4, max_batched_tokens=16, order="priority")
    assert run(tight, prompt, how, interrupted=True) == free
    assert tight.scheduler.counts.preemptions > 3


def run(core, prompt, how, interrupted=False):
    """Tokens of five requests; `interrupted`: a running one is put back every third step."""
    tokens = {f"r{i}": [] for i in range(5)}
    for i, name in enumerate(tokens):
        core.submit(Request(name, prompt, evolve(how, seed=how.seed + i)))
    for step in range(1000):
        if not core.busy:
            return tokens
        if interrupted and step % 3 == 2 and core.scheduler.running > 1:
            core.scheduler.preempt(int(core.scheduler._running[-1]))
        for event in core.step():
            tokens[event.request_id].append(event.token)
    raise AssertionError("it does not end")


def test_an_output_goes_on_in_another_core(text_checkpoint):
    """As a front asks for it that lost its core."""
    how = SamplingParams(max_tokens=150, grammar=GRAMMARS["regex"][0], temperature=1.2, seed=3)
    whole = run(make_core(text_checkpoint), [50], how)["r0"]
    (request,) = unpack(pack(("again", Request("r0", [50], how, output=[whole[:6]]))))[1:]
    core = make_core(text_checkpoint)
    core.submit(request, again=True)
    rest = []
    while core.busy:
        rest += [event.token for event in core.step()]
    assert whole[:6] + rest == whole


def test_guesses_do_not_lead_out_of_the_grammar(tmp_path):
    """The prompt repeats itself, so that the next tokens are guessed; neighbours of a grammar's row still get some."""
    backend = save_tokenizer(tmp_path)
    save_reciting(tmp_path, "abcdefghij", backend)
    guess = "prefix-dedup,speculative-branching,kernel-fusion"
    with SageLLMEngine(str(tmp_path), pipeline=guess) as engine:
        known = backend.encode("<|assistant|>abcdefghij").ids * 3 + backend.encode("<|assistant|>").ids
        bound = SamplingParams(max_tokens=9, grammar=Grammar.regex("ab[x-z]{2}[a-z]{2}"))
        free = SamplingParams(max_tokens=10, ignore_eos=True)
        first, second = (engine.stream(known, how) for how in (bound, free))
        assert re.fullmatch("ab[x-z]{2}[a-z]{2}", first.wait().text) and second.wait().text == "abcdefghij"
        assert engine.stats().drafted > 0


def test_passes_keep_the_meaning_and_a_recorded_step_runs_again(text_checkpoint, tmp_path):
    core = make_core(text_checkpoint, record=tmp_path, check_passes=1)
    how = SamplingParams(max_tokens=3, grammar=Grammar.regex("[0-9]+"), temperature=1.0, seed=1, min_tokens=2)
    core.submit(Request("a", [50, 51, 52], how))
    core.submit(Request("b", [50, 51, 60], SamplingParams(max_tokens=3)))
    while core.busy:
        core.step()
    assert core.counters.checked == {"equal": 3}
    again = replay(tmp_path / "step-00001.mlir")
    assert again.difference == 0 and again.outcome.tokens.tolist() == again.recorded_tokens.tolist()
    assert "nn.allow" in (tmp_path / "step-00001.mlir").read_text()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("(a"), "regex cannot be compiled: "),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.lark("start: ??"), "lark cannot be compiled: "),
        (Grammar.gbnf("root ::= ((("), "gbnf "),
        (Grammar.json({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (Grammar.json({"type": "integer", "multipleOf": 99991}), "json takes "),
        (
            Grammar.json(
                {"allOf": [{"anyOf": [{"pattern": f"{i}{j}"} for j in range(9)]} for i in range(9)]}
            ),
            "json ",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(engine, grammar, message):
    with pytest.raises(UserError) as refused:
        engine.generate(["x"], SamplingParams(grammar=grammar))
    assert message in str(refused.value) and "\n" not in str(refused.value)


BOMBS = [
    Grammar.regex("((((a{1,1000}){1,1000}){1,1000}){1,1000})b"),
    Grammar.regex("(a|aa|aaa)*b(a|b)*a(a|b){20}"),
    Grammar.regex(r"(\w+\s?){50}\p{L}{100}"),
    Grammar.lark('start: a\na: a a a | "x" | '),
    Grammar.json({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
    Grammar.json({"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8} for i in range(20)}
                  | {"d20": {"type": "string"}}, "$ref": "#/$defs/d0"}),
]  # fmt: skip


@pytest.mark.parametrize("grammar", BOMBS, ids=lambda g: g.text[:30])
def test_a_bomb_is_refused_or_fails_alone(engine, grammar):
    """Whichever of its limits the library runs into: others go on, and the engine is as before."""
    other = engine.stream("x", SamplingParams(max_tokens=30, ignore_eos=True))
    stream = engine.stream("x", SamplingParams(max_tokens=20, grammar=grammar))
    try:
        result = stream.wait()
        assert result.finish_reason in ("stop", "length") or "grammar" in result.error.lower()
    except UserError as error:
        assert "\n" not in str(error)
    assert len(other.wait().token_ids) == 30
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0


def test_a_model_without_tokenizer_has_no_grammars(checkpoint):
    with (
        SageLLMEngine(str(checkpoint("LlamaForCausalLM"))) as engine,
        pytest.raises(UserError, match=r"without tokenizer\.json"),
    ):
        engine.generate([[1, 2]], SamplingParams(grammar=Grammar.json()))
