"""Settings and schemas as JSON and YAML texts, read strictly. A leaf.

YAML is read by the core schema of YAML 1.2, so that `off` and `2:4` are texts and not false and 124, as they are in
YAML 1.1; a key that is given twice is refused.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import attrs
import cattrs
import yaml
from cattrs.gen import make_dict_structure_fn

from sagellm.errors import UserError, unknown

VERSION = 1
"""Of the documents that `Document` writes and reads."""

SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
)
"""What a plain scalar of YAML 1.2 means: tag, pattern, first characters. Others are texts."""

TAG_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What PyYAML raises: its own errors, and whatever a value does that is not of its explicit tag, as in `!!bool x`."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}


_Dumper.add_representer(
    str,
    # PyYAML folds some line separators unless they are quoted
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)
for _tag, _pattern, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _firsts = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _firsts)


def parse_yaml(text: str, where: str) -> Any:
    """`where` names the text in errors."""
    try:
        return yaml.load(text, _Loader)
    except TAG_ERRORS as error:
        raise UserError(f"{where} is no YAML: {_one_line(error)}") from error


def parse_json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict:
        if twice := [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]:
            raise ValueError(f"key {twice[0]!r} is given twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {_one_line(error)}") from error


def read(path: str | Path) -> Any:
    """What a .yaml, .yml or .json file holds."""
    path = Path(path)
    parse = {".yaml": parse_yaml, ".yml": parse_yaml, ".json": parse_json}.get(path.suffix)
    if parse is None:
        raise UserError(f"cannot read {str(path)!r}; accepted: a file that ends in .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    return parse(text, str(path))


def unknown_key(what: str, key: object, accepted: Iterable[str]) -> UserError:
    """`unknown WHAT 'blok_size'; accepted: ...; did you mean block_size?`"""
    names = sorted(accepted)
    error = unknown(what, key, names)
    near = difflib.get_close_matches(str(key), names, 1)
    return UserError(f"{error}; did you mean {near[0]}?") if near else error


def check_keys(where: str, given: object, cls: type) -> None:
    """That a mapping has the keys that an attrs class needs, and no others."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {given!r}; accepted: a mapping of its fields")
    fields = attrs.fields_dict(cls)
    for key in given:
        if key not in fields:
            raise unknown_key(f"key in {where}", key, fields)
    needed = [name for name, each in fields.items() if each.default is attrs.NOTHING]
    if missing := [name for name in needed if name not in given]:
        raise UserError(f"{where} lacks {', '.join(missing)}; needed: {', '.join(needed)}")


class Document:
    """An attrs class that is exchanged as a document: its fields, and `schema` (its name) and `version`.

    Each `from_` refuses, with one `UserError`, another schema or version, an unknown key, a missing one (of a field
    without default) and a value that its field does not take.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, texts, numbers, true, false and None."""
        return {"schema": type(self).__name__, "version": VERSION} | _CONVERTER.unstructure(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        name = cls.__name__
        if not isinstance(given, Mapping):
            raise UserError(f"{name} is {given!r}; accepted: a mapping of its fields")
        if given.get("schema") != name:
            raise UserError(f"schema is {given.get('schema')!r}; accepted: {name!r}")
        version = given.get("version")
        if version != VERSION or not isinstance(version, int) or isinstance(version, bool):
            raise UserError(f"version of {name} is {version!r}; accepted: {VERSION}")
        fields = {key: value for key, value in given.items() if key not in ("schema", "version")}
        return _CONVERTER.structure(fields, cls)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(parse_json(text, cls.__name__))

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        return cls.from_dict(parse_yaml(text, cls.__name__))


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _make_converter() -> cattrs.Converter:
    """Values pass as they are, for the fields' validators to judge; lists become tuples and sets, mappings classes."""
    converter = cattrs.Converter(
        detailed_validation=False, unstruct_collection_overrides={AbstractSet: sorted, tuple: list}
    )
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, lambda value, _: value)

    def class_hook(cls: type):
        build = make_dict_structure_fn(cls, converter, _cattrs_detailed_validation=False)

        def structure(value, _):
            check_keys(cls.__name__, value, cls)
            return build(value, cls)

        return structure

    def collection(value, kind):
        try:
            return get_origin(kind)(value) if isinstance(value, list) else value
        except TypeError:  # an item that no set can hold
            return value

    def mapping(value, kind):
        if not isinstance(value, Mapping):
            return value
        return {name: converter.structure(item, get_args(kind)[1]) for name, item in value.items()}

    converter.register_structure_hook_factory(attrs.has, class_hook)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) in (tuple, frozenset), collection)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is dict, mapping)
    return converter


_CONVERTER = _make_converter()
