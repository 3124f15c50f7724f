"""Reasoning and calls are found in a text however it is cut into pieces."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.server.parsing import FORMS, Parser, form_of

WEATHER = {"name": "weather", "arguments": {"city": "Paris", "说": "{<tool_call>}"}}
ARGUMENTS = json.dumps(WEATHER["arguments"], ensure_ascii=False)
HERMES = f"<tool_call>\n{json.dumps(WEATHER)}\n</tool_call>"
LLAMA = json.dumps({"name": "weather", "parameters": WEATHER["arguments"]})
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
CALL = {"name": "weather", "arguments": ARGUMENTS}

CASES = [
    ("hermes", "Just a < text <tool", "Just a < text <tool", "", []),
    ("hermes", f"Let me see. {HERMES}\n{HERMES}", "Let me see. \n", "", [CALL, CALL]),
    ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", "", []),
    ("hermes", "<tool_call>[1, 2]</tool_call> x", "<tool_call>[1, 2]</tool_call> x", "", []),
    ("hermes", f"<think>A call? {{</think>{HERMES}", "", "A call? {", [CALL]),
    ("llama", LLAMA, "", "", [CALL]),
    ("llama", "Braces {a: 1} in text", "Braces {a: 1} in text", "", []),
    ("llama", '{"no": "call"}', '{"no": "call"}', "", []),
    ("deepseek", f"First.{DEEPSEEK}", "First.", "", [CALL]),
    (None, f"{HERMES}<think>hm</think>!", f"{HERMES}!", "hm", []),
]


def parsed(form, pieces, **more):
    parser = Parser(FORMS.get(form), reasons=True, **more)
    parts = [part for piece in pieces for part in parser.push(piece)] + list(parser.finish())
    calls = [part.call for part in parts if part.call is not None]
    assert parser.calls == len(calls)
    return "".join(p.content for p in parts), "".join(p.reasoning for p in parts), calls


@pytest.mark.parametrize(("form", "text", "content", "reasoning", "calls"), CASES)
@examples(30)
@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_a_text_has_the_same_parts_however_it_comes(form, text, content, reasoning, calls, cuts):
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert parsed(form, pieces) == parsed(form, list(text)) == (content, reasoning, calls)


def test_reasoning_that_the_template_opened():
    assert parsed(None, ["so ", "it is</th", "ink>Yes"], thinking=True) == ("Yes", "so it is", [])


def test_a_template_tells_the_form():
    assert form_of("... {{'<tool_call>'}} ...") == "hermes"
    assert form_of("<|python_tag|>") == "llama" and form_of("plain") is None
