"""The tokenizer gives the ids, texts and prompts that transformers gives; bad folders and messages end in one line."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The end.\n\nThe fox said: no, no, no!",
    "中文分词器把文字切成小块，再变成数字。",
    "naïve café — “quotes” … 🙂 👩‍👩‍👧",
    "",
    "  <s> literal specials </s><|im_end|> and spaces  ",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {
        "__type": "AddedToken",
        "content": "</s>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    },
    "clean_up_tokenization_spaces": False,
}
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set offset = 1 %}{% else %}{% set offset = 0 %}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == offset) and message.role != 'system' %}
        {{- raise_exception('Conversation roles must\\nalternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + message.content.strip() + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{%- if tools %}{{ 'Tools: ' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'developer' %}{% continue %}{% endif %}
    {{- message | tojson(indent=2) }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}
{%- endfor %}{{ strftime_now('%Y') | length }}{{ documents is none }}"""
CHAT = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "  你好 'there'"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "more"},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "北京 <&>"}}}


def backend(post_processor=None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens(["<|im_end|>"])
    if post_processor is not None:
        made.post_processor = post_processor
    return made


ADDS_BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


@pytest.fixture
def folder(tmp_path):
    def write(config: dict | None = None, made: tokenizers.Tokenizer | None = None, **files: str) -> Path:
        (made or backend()).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | (config or {})))
        for name, text in files.items():
            (tmp_path / name.replace("_jinja", ".jinja")).write_text(text)
        return tmp_path

    return write


def error_line(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ids and text


@pytest.mark.parametrize("post_processor", [None, processors.ByteLevel(trim_offsets=False), ADDS_BOS])
@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_equal_transformers(folder, post_processor, special):
    path = folder({"eos_token": "<|im_end|>"}, backend(post_processor))
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)


def test_a_llama_tokenizer_gives_text_back_and_tells_its_bytes(folder):
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.train_from_iterator(TEXTS[:1], trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False))
    state = json.loads(made.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"]["byte_fallback"] = True
    ours = Tokenizer.load(folder(made=tokenizers.Tokenizer.from_str(json.dumps(state))))

    for text in TEXTS[:3]:
        assert ours.decode(ours.encode(text)) == text
    newline, wide, space = map(ours.token_id, ["<0x0A>", "<0xE4>", "▁"])
    assert not ours.byte_level
    assert (ours.token_bytes(newline), ours.token_bytes(wide), ours.token_bytes(space)) == (
        b"\n",
        b"\xe4",
        None,
    )
    assert list(map(ours.token_text, [newline, wide, space])) == ["\n", "\ufffd", " "]


def test_the_bytes_of_byte_level_tokens_join_to_the_text(folder):
    ours = Tokenizer.load(folder())
    assert ours.byte_level
    for text in TEXTS:
        ids = ours.encode(text)
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    assert ours.token_text(ours.encode(" fox")[0]).startswith(" ")
    beyond = ours.vocab_size + 7
    assert (ours.token_bytes(beyond), ours.token_text(beyond), ours.decode([beyond])) == (b"", "", "")


def test_truncation_and_padding_written_in_the_file_are_not_applied(folder):
    made = backend()
    made.enable_truncation(4)
    made.enable_padding(length=64)
    ours = Tokenizer.load(folder(made=made))
    assert len(ours.encode(TEXTS[0])) > 4 and ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]
    assert len(ours.encode("a")) == 1


def test_specials_are_those_of_the_file_and_those_the_configuration_names(folder):
    ours = Tokenizer.load(folder({"eos_token": "<|im_end|>", "pad_token": "not in the vocabulary"}))
    assert ours.special_ids == {0, 1, 2, ours.token_id("<|im_end|>")}
    assert ours.named_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "add_bos_token, post_processor, count",
    [(True, None, 1), (True, ADDS_BOS, 1), (False, None, 0), (None, None, 0)],
)
def test_add_bos_token_is_honoured_once(folder, add_bos_token, post_processor, count):
    ours = Tokenizer.load(folder({"add_bos_token": add_bos_token}, backend(post_processor)))
    assert ours.encode("The fox").count(1) == count
    assert ours.encode("The fox", add_special_tokens=False).count(1) == 0


def test_a_lone_surrogate_is_a_user_error(folder):
    assert "surrogates" in error_line(Tokenizer.load(folder()).encode, "a\ud800b")


# chat templates


@pytest.mark.parametrize("template", [CHATML, LLAMA, TOOLS])
@pytest.mark.parametrize(
    "options", [{}, {"tools": [TOOL], "enable_thinking": False}, {"bos_token": "<other>"}]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_prompts_equal_transformers(folder, template, options, prompt):
    path = folder({"chat_template": template})
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt, **options)
    assert ours.apply_chat_template(CHAT, add_generation_prompt=prompt, **options) == expected
    assert expected


def test_a_template_is_taken_by_file_then_by_name_for_tools(folder):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    ours = Tokenizer.load(folder({"chat_template": named}))
    assert ours.apply_chat_template(CHAT) == "plain"
    assert ours.apply_chat_template(CHAT, tools=[TOOL]) == "tools"
    assert (
        Tokenizer.load(folder({"chat_template": "config"}, chat_template_jinja="file")).apply_chat_template(
            CHAT
        )
        == "file"
    )


def test_what_a_template_refuses_is_told_in_its_words(folder):
    ours = Tokenizer.load(folder({"chat_template": LLAMA}))
    message = error_line(ours.apply_chat_template, [CHAT[1], CHAT[3]])
    assert message == "the chat template refuses the messages: Conversation roles must alternate"


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.nothing.more }}", "UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set _ = messages.append(1) %}", "SecurityError"),
        ("{% for a in range(9999) %}" + "0123456789" * 99 + "{% endfor %}", "over 4194304"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
            "more than 2 s",
        ),
        ("{{ 'a' * 99999999 }}", "the result of * is too large"),
        ("{{ [0] * 99999999 }}", "the result of * is too large"),
        ("{{ 9 ** 99999999 }}", "the result of ** is too large"),
        (
            "{% set n = namespace(x='ab') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "of ~ is",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for a in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "of + is",
        ),
        ("{% set x = 'a' * 9999 %}{{ x.replace('a', x) }}", "the result of replace is too large"),
        ("{% set x = 'a' * 9999 %}{{ x | replace('a', x) }}", "the result of replace is too large"),
        ("{% set x = 'a' * 9999 %}{{ x.join(x) }}", "the result of join is too large"),
        ("{% set x = 'a' * 9999 %}{{ x | join(x) }}", "the result of join is too large"),
        ("{{ 'a'.ljust(99999999) }}", "the result of ljust is too large"),
        ("{{ 'a' | center(99999999) }}", "the result of center is too large"),
        ("{{ 'a' | indent(99999999, true) }}", "the result of indent is too large"),
        ("{{ '%99999999s' % 1 }}", "the result of % is too large"),
        ("{{ '{:99999999}'.format(1) }}", "the result of format is too large"),
        ("{% for %}", "malformed, line 1"),
        ("{{ x | nofilter }}", "malformed, line 1"),
    ],
)
def test_a_template_that_fails_ends_in_one_line(folder, template, told):
    ours = Tokenizer.load(folder({"chat_template": template}))
    assert told in error_line(ours.apply_chat_template, CHAT)


@pytest.mark.parametrize(
    "messages, told",
    [
        ([], "messages is []"),
        ("hi", "messages is 'hi'"),
        (None, "messages is None"),
        (["hi"], "messages[0] is 'hi'"),
        ([{"content": "hi"}], "messages[0] is {'content': 'hi'}"),
        ([CHAT[1], {"role": 3, "content": "hi"}], "messages[1] is"),
        ([{"role": "user"}], "messages[0].content is None"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content is ['a']"),
        ([{"role": "user", "content": {"text": "\n" * 10**6}}], "messages[0].content is"),
    ],
)
def test_messages_of_another_shape_are_named(folder, messages, told):
    ours = Tokenizer.load(folder({"chat_template": CHATML}))
    message = error_line(ours.apply_chat_template, messages)
    assert told in message and "accepted: " in message and len(message) < 300


def test_parts_and_tool_calls_reach_the_template(folder):
    ours = Tokenizer.load(folder({"chat_template": "{{ messages | tojson }}"}))
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "tool_calls": []},
    ]
    assert json.loads(ours.apply_chat_template(messages)) == messages
    assert "tools is" in error_line(ours.apply_chat_template, messages, tools=["f"])


# folders


def test_a_folder_that_cannot_be_used_is_named_in_one_line(folder, tmp_path):
    assert "no tokenizer.json" in error_line(Tokenizer.load, tmp_path / "nowhere")
    path = folder()
    assert "has no chat template" in error_line(Tokenizer.load(path).apply_chat_template, CHAT)
    for name, text in [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{\n\n'bad'"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
    ]:
        path = folder()
        (path / name).write_text(text)
        message = error_line(Tokenizer.load, path)
        assert str(path / name) in message and "accepted: " in message
    path = folder()
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja" in error_line(Tokenizer.load, path)
