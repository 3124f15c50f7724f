"""Text to token ids and back, and chat messages to a prompt, from the tokenizer files of a model folder.

Read are tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
additional_chat_templates/*.jinja, with the meaning that transformers gives them.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from attrs import frozen

from sagellm.engine.chat_template import check_messages, compiled, one_line, render
from sagellm.errors import UserError

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")

TOKENIZER_FILE = "tokenizer.json"


@frozen(eq=False, repr=False, kw_only=True)
class Tokenizer:
    """The tokenizer of one model; `Tokenizer.load` makes it."""

    _backend: tokenizers.Tokenizer
    _folder: Path
    _templates: dict[str, str]
    """Chat templates by name; the usual one is `default`."""
    named_tokens: dict[str, str]
    """`bos_token`, `eos_token` and the like, as the configuration names them, with their texts."""
    special_ids: frozenset[int]
    """Tokens that `decode` leaves out unless told otherwise."""
    byte_level: bool
    """Whether every token stands for bytes (GPT-2's way), rather than for text."""
    _byte_fallback: bool
    _prefix: list[int]
    """The bos token, where the configuration wants it and tokenizer.json does not add it."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Raises UserError where a file is missing or malformed."""
        folder = Path(folder)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(
                f"no {TOKENIZER_FILE} in {str(folder)!r}; accepted: a folder of a Hugging Face model"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file} is malformed: {one_line(error)}; accepted: a tokenizers file") from error
        backend.no_truncation()
        backend.no_padding()

        config = _read_object(folder / "special_tokens_map.json") | _read_object(
            folder / "tokenizer_config.json"
        )
        named = _named_tokens(config)
        _mark_special(backend, named.values())
        decoders = _decoder_types(backend)
        return cls(
            backend=backend,
            folder=folder,
            templates=_chat_templates(folder, config),
            named_tokens=named,
            special_ids=frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special),
            byte_level=decoders == {"ByteLevel"},
            byte_fallback="ByteFallback" in decoders,
            prefix=_missing_bos(backend, config, named),
        )

    def __repr__(self) -> str:
        return f"Tokenizer({str(self._folder)!r})"

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, the added ones among them; the model's logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """As tokenizer.json has it, with the tokens that the configuration makes special."""
        return self._backend.to_str()

    def token_id(self, text: str) -> int | None:
        """The id of a token by its vocabulary entry, such as `</s>`."""
        return self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens are those that tokenizer.json puts around a text, and the bos token."""
        try:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise UserError(
                f"text is {reprlib.repr(text)}; accepted: Unicode text, no lone surrogates"
            ) from None
        return self._prefix + ids if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 show as U+FFFD, ids outside the vocabulary as nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes a token stands for, b"" outside the vocabulary; None where it stands for text."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self.byte_level:
            try:
                return bytes(_bytes_of_characters()[character] for character in piece)
            except KeyError:  # an added token, written as itself
                return piece.encode()
        if self._byte_fallback and _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(piece[3:5])
        return None

    def token_text(self, token: int) -> str:
        """What a token adds to running text, with its leading space; part of a character shows as U+FFFD."""
        raw = self.token_bytes(token)
        if raw is not None:
            return raw.decode(errors="replace")
        return self._backend.id_to_token(token).replace("▁", " ")

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False, as templates write bos.

        Messages and tools are those of the OpenAI API; `extra` are further variables of the template, such as
        enable_thinking. Raises UserError where there is no template, where the messages have another shape, and
        with the template's own words where it refuses them.
        """
        check_messages(messages)
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        ):
            raise UserError(f"tools is {reprlib.repr(tools)}; accepted: a list of objects")
        variables = {"documents": None} | self.named_tokens | extra
        variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return render(self._template(tools), variables)

    @property
    def chat_template(self) -> str:
        """The source of all its templates; empty if there is none."""
        return "\n".join(self._templates.values())

    def _template(self, tools: list | None) -> jinja2.Template:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise UserError(
                f"the model in {str(self._folder)!r} has no chat template; accepted: chat_template.jinja in that"
                " folder, or chat_template in its tokenizer_config.json"
            )
        try:
            return compiled(self._templates[name])
        except Exception as error:  # Python, too, may refuse what the template compiles to
            raise UserError(
                f"chat template {name!r} in {str(self._folder)!r} is malformed,"
                f" line {getattr(error, 'lineno', '?')}: {one_line(error)}; accepted: a jinja template"
            ) from error


# files


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is malformed: {one_line(error)}; accepted: UTF-8 text") from error


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an absent file is empty."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is malformed: {one_line(error)}; accepted: a JSON object") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {reprlib.repr(value)}; accepted: a JSON object")
    return value


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Entries `*_token`: a text, or an object that holds it as its content."""
    entries = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _mark_special(backend: tokenizers.Tokenizer, texts) -> None:
    """Tokens the configuration names are special, even where tokenizer.json does not say so."""
    added = backend.get_added_tokens_decoder()
    tokens = []
    for text in texts:
        token_id = backend.token_to_id(text)
        if token_id is None:
            continue
        token = added.get(token_id) or tokenizers.AddedToken(text, normalized=False)
        token.special = True
        tokens.append(token)
    backend.add_special_tokens(tokens)


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def _missing_bos(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> list[int]:
    bos = backend.token_to_id(named.get("bos_token", ""))
    if config.get("add_bos_token") is not True or bos is None or backend.encode("").ids[:1] == [bos]:
        return []
    return [bos]


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files, or else those of the configuration: one text, or a list of named ones."""
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    match config.get("chat_template"):
        case None:
            return {}
        case str(template):
            return {"default": template}
        case [*entries] if all(map(_is_named_template, entries)):
            return {entry["name"]: entry["template"] for entry in entries}
        case other:
            raise UserError(
                f"chat_template in {folder / 'tokenizer_config.json'} is {reprlib.repr(other)};"
                " accepted: a text, or a list of objects with name and template"
            )


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


@cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's bytes_to_unicode, turned round: printable bytes stand for themselves, the others for 256 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
