"""What a grammar may be, and what is said of one that is none."""

import pytest

from sagellm.batch import SamplingParams
from sagellm.errors import UserError
from sagellm.grammar import MAX_CHOICES, MAX_NESTING, Grammar

pytestmark = pytest.mark.contract
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "中文"]}}}


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth // 2):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json(nested(2 * MAX_NESTING)), "json is nested deeper than 64"),
        (lambda: Grammar.json("[" * 100_000), "json is no valid JSON"),
        (lambda: Grammar.json("nonsense"), "json is no valid JSON"),
        (lambda: Grammar.json("[1]"), "json is list; accepted: a JSON schema"),
        (lambda: Grammar.json({"enum": ["x" * 200_000]}), "accepted: a text of 1 to 131072 characters"),
        (lambda: Grammar.regex("a" * 20_000), "regex is 20000 characters; accepted: a text of 1 to 16384"),
        (lambda: Grammar.choice(["a"] * (MAX_CHOICES + 1)), "choice has 1025 texts; accepted: 1 to 1024"),
        (lambda: Grammar.choice([]), "choice has 0 texts"),
        (lambda: Grammar.gbnf('r ::= "a"\n' * 300), "gbnf has 300 rules; accepted: at most 256"),
        (lambda: Grammar.choice("ab"), "choice is no list of texts"),
        (lambda: Grammar("regex", "a", "x" * 300_000), "accepted: a text of at most 262144 characters"),
        (lambda: Grammar.json({1: {2}}), "json is no JSON schema"),
        (lambda: Grammar("yaml", "a"), "unknown kind 'yaml'; accepted: json, regex, choice, lark, gbnf"),
        (
            lambda: SamplingParams(grammar="a+"),
            "grammar is 'a+'; accepted: a Grammar, a mapping like {'regex': text}, or nothing",
        ),
    ],
)
def test_what_is_no_grammar_is_one_line(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_grammar_may_be_a_mapping_as_files_have_it():
    assert SamplingParams(grammar={"regex": "a+"}).grammar == Grammar.regex("a+")
    assert SamplingParams(grammar={"json": SCHEMA}).grammar == Grammar.json(SCHEMA)
    for kind in ("lark", "gbnf"):
        assert SamplingParams(grammar={kind: "start: x"}).grammar == getattr(Grammar, kind)("start: x")
    assert SamplingParams(grammar={"choice": ["a", "b"]}).grammar == Grammar.choice(["a", "b"])


def test_any_json_is_a_grammar():
    assert Grammar.json() == Grammar.json({"type": "object"}) and Grammar.json(True).text == "true"
