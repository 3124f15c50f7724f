"""`sagellm passes`: what each pass does, when it declines, and its options. Text from the passes' docstrings."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sagellm.errors import UserError
from sagellm.passes import DEFAULT, PASSES, registry

if TYPE_CHECKING:
    from sagellm.passes.driver import Pass

WIDTH = 100
GRAPHS = {
    "batch": "rewrites every step's batch graph",
    "model": "rewrites the model graph and the weights program",
}
_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=decide:|apply:|Declines\b)")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.option("--load-pass", "extra", multiple=True, metavar="MODULE:CLASS", help="List this pass too.")
def passes(as_json: bool, extra: tuple[str, ...]) -> None:
    """List the passes: which graph each rewrites, what it does, when it declines, its options."""
    entries = [entry(name, load) for name, load in known_passes(extra).items()]
    if as_json:
        click.echo(json.dumps({"passes": entries, "default": DEFAULT}, indent=2, default=str))
    else:
        click.echo("\n\n".join([*map(as_text, entries), f"default pipeline:\n    {DEFAULT}"]))


def entry(name: str, load: Callable[[], type[Pass]]) -> dict[str, Any]:
    """What is to be said about a pass. One that cannot be imported is listed with the reason."""
    from sagellm.passes.driver import options

    try:
        kind = load()
        paragraphs = [" ".join(p.split()) for p in _PARAGRAPH.split(inspect.getdoc(kind) or "")]
        declines = [p for p in paragraphs if p.startswith("Declines")]
        return {
            "name": name,
            "graph": kind.graph,
            "does": [p for p in paragraphs if p not in declines],
            "declines": " ".join(declines),
            "options": [
                {"name": option, "type": type_, "default": None if default is MISSING else default}
                for option, type_, default in options(kind)
            ],
        }
    except Exception as error:  # a stranger's module may fail in any way; the list goes on
        return {"name": name, "error": f"cannot be loaded: {type(error).__name__}: {error}"}


def as_text(pass_: dict[str, Any]) -> str:
    def indented(text: str, indent: str = "    ", hanging: str = "") -> str:
        return textwrap.fill(
            text,
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )

    if "error" in pass_:
        return f"{pass_['name']}\n{indented(pass_['error'])}"
    lines = [f"{pass_['name']}: {GRAPHS[pass_['graph']]}", *map(indented, pass_["does"])]
    if pass_["declines"]:
        lines.append(indented(pass_["declines"]))
    for option in pass_["options"]:
        default = str(option["default"]).lower() if option["type"] == "bool" else option["default"]
        lines.append(
            indented(f"option {option['name']}: {option['type']}, default {default}", hanging="    ")
        )
    return "\n".join(lines)


def known_passes(extra: Iterable[str] = ()) -> dict[str, Callable[[], type[Pass]]]:
    """The registry, ours first, and the passes that `--load-pass` names."""
    found = registry()
    loaded = {kind.name: partial(_same, kind) for kind in map(load_pass, extra)}
    return {name: found[name] for name in (*PASSES, *sorted(found.keys() - PASSES))} | loaded


def _same(kind: type[Pass]) -> type[Pass]:
    return kind


def load_pass(where: str) -> type[Pass]:
    """The pass class at `package.module:Class` or `path/to/file.py:Class`."""
    from sagellm.passes.driver import Pass

    module_name, _, name = where.rpartition(":")
    if not module_name or not name:
        raise UserError(f"--load-pass is {where!r}; accepted: module:Class or file.py:Class")
    try:
        module = _module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"--load-pass {where}: {error}") from error
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Pass):
        found = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Pass)]
        accepted = ", ".join(n for n in found if n != "Pass") or "a subclass of sagellm.passes.driver.Pass"
        raise UserError(f"--load-pass {where}: {name!r} is no pass; accepted: {accepted}")
    for needed, accepted in (("name", "a text such as 'my-pass'"), ("graph", "'batch' or 'model'")):
        if not hasattr(kind, needed):
            raise UserError(f"--load-pass {where}: the class has no {needed!r}; accepted: {accepted}")
    return kind


def _module(name: str):
    if not name.endswith(".py"):
        return import_module(name)
    alias = f"_sagellm_pass_{Path(name).stem}"
    spec = importlib.util.spec_from_file_location(alias, name)
    assert spec is not None and spec.loader is not None
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
