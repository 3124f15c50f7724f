"""`sagellm new-pass`: a package with a pass to begin from, and the tests that every pass should have."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

import click

from sagellm.cli.passes import known_passes
from sagellm.errors import UserError

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "sagellm-$name"
version = "0.1.0"
dependencies = ["sagellm"]

[project.optional-dependencies]
test = ["sagellm[test]"]

[project.entry-points."sagellm.passes"]
$name = "$module:$class_name"

[tool.setuptools]
py-modules = ["$module"]
"""

MODEL_PASS = '''\
"""A pass over the model graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sagellm.ir.dialects import nn
from sagellm.ir.edit import replace
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, rewrites


@dataclass(frozen=True)
class $class_name(Pass):
    """Drops casts to the type that a value has already.

    Declines a cast that changes the type.
    """

    name: ClassVar[str] = "$name"
    graph: ClassVar[Literal["model"]] = "model"

    @rewrites(nn.Cast)
    def cast(self, op: nn.Cast, graph: IRGraph, context: PassContext) -> None:
        if op.x.type != op.result.type:
            self.declined(context, op, "it changes the type")
            return
        self.applied(context, op, "the value has this type already", predicted=context.costs.call)
        replace(op, [op.x])
'''

MODEL_FILECHECK = """\
// RUN: sagellm opt %s --load-pass %S/$module.py:$class_name -p $name --remarks | filecheck %s

// CHECK: // $name: applied at %same = nn.cast (operation 1 of @f): the value has this type already
// CHECK-NEXT: // $name: declined at %wide = nn.cast (operation 1 of @f): it changes the type
// CHECK: nn.func @f
// CHECK-NEXT: %wide = nn.cast %x : tensor<?x8xf32>
// CHECK-NEXT: nn.return %wide

nn.func @f(%x: tensor<?x8xbf16>) -> tensor<?x8xf32> {
  %same = nn.cast %x : tensor<?x8xbf16>
  %wide = nn.cast %same : tensor<?x8xf32>
  nn.return %wide
}
"""

MODEL_TEST = '''\
"""The model means the same after the pass."""

import pytest
from $module import $class_name

from sagellm import backends
from sagellm.meaning.check import check_model_passes
from sagellm.models.config import load_config
from sagellm.models.decoder import build_model
from sagellm.models.hub import BUILTIN
from sagellm.passes.driver import PassContext, Pipeline


@pytest.mark.parametrize("phases", [("decode",), ("prefill",), ("decode", "prefill")])
def test_logits_and_cache_are_the_same(phases):
    model = build_model(load_config(BUILTIN), "bfloat16", phases)
    check_model_passes(model, Pipeline([$class_name()]), PassContext(backends.load("cpu").capability))
'''

BATCH_PASS = '''\
"""A pass over the batch graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sagellm.batch import Batch, Phase
from sagellm.ir.attrs import word
from sagellm.ir.dialects import batch as b
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, StepView, rewrites

SEVERAL = "several"
"""A fact: the step has more than one prompt."""


@dataclass(frozen=True)
class $class_name(Pass):
    """Notes steps that have several prompts.

    Declines steps with one prompt.
    """

    name: ClassVar[str] = "$name"
    graph: ClassVar[Literal["batch"]] = "batch"

    def decide(self, batch: Batch, view: StepView) -> None:
        if len(batch.prefill) > 1:
            batch.facts[Phase.PREFILL] = (*batch.facts.get(Phase.PREFILL, ()), SEVERAL)
            batch.notes[self.name] = f"{len(batch.prefill)} prompts"

    @rewrites(b.Group)
    def group(self, op: b.Group, graph: IRGraph, context: PassContext) -> None:
        if op.phase.data != "prefill":
            return
        if op.facts is None or word(SEVERAL) not in op.facts.data:
            self.declined(context, op, "one prompt")
            return
        self.applied(context, op, "several prompts")
'''

BATCH_FILECHECK = """\
// RUN: sagellm opt %s --load-pass %S/$module.py:$class_name -p $name --split-input-file --remarks | filecheck %s

// CHECK: // $name: applied at %prefill = batch.group (operation 1 of @step): several prompts
// CHECK: batch.step @step
// CHECK: // $name: declined at %prefill = batch.group (operation 1 of @step): one prompt

batch.step @step {
  %prefill = batch.group {bucket = 8, facts = [several], phase = prefill, table = #batch.table<2 rows>}
    : !batch.group<prefill>
  %blocks = kv.allocate %prefill : !kv.blocks
}

// -----

batch.step @step {
  %prefill = batch.group {bucket = 8, phase = prefill, table = #batch.table<1 rows>} : !batch.group<prefill>
  %blocks = kv.allocate %prefill : !kv.blocks
}
"""

BATCH_TEST = '''\
"""A step means the same after the pass."""

import numpy as np
import pytest
from $module import $class_name

from sagellm import backends
from sagellm.batch import Batch, Columns, Request
from sagellm.meaning.check import check_pipeline
from sagellm.models.config import load_config
from sagellm.models.decoder import build_model
from sagellm.models.hub import BUILTIN
from sagellm.passes.driver import PassContext, Pipeline


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8, 9]]], ids=["one prompt", "two prompts"])
def test_logits_tokens_and_cache_are_the_same(prompts):
    columns = Columns(len(prompts), 16, 4)
    for row, prompt in enumerate(prompts):
        columns.fill(row, Request(str(row), prompt))
    columns.new[:] = columns.length
    rows = np.arange(len(prompts))
    model = build_model(load_config(BUILTIN), "float32", ("prefill",))
    context = PassContext(backends.load("cpu").capability)
    check_pipeline(Pipeline([$class_name()]), context, model, Batch(columns, rows[:0], rows))
'''

FILES = {
    "model": {"{module}.py": MODEL_PASS, "{module}.mlir": MODEL_FILECHECK, "test_{module}.py": MODEL_TEST},
    "batch": {"{module}.py": BATCH_PASS, "{module}.mlir": BATCH_FILECHECK, "test_{module}.py": BATCH_TEST},
}


@click.command("new-pass")
@click.argument("name")
@click.option("--graph", default="model", show_default=True, help="model, or batch: which graph it rewrites.")
@click.option(
    "--directory", "-d", type=click.Path(path_type=Path), help="Where to write it.  [default: NAME]"
)
def new_pass(name: str, graph: str, directory: Path | None) -> None:
    """Write a package with a pass NAME: the class, a FileCheck test, a test against the operations' meaning, and the
    entry point by which sageLLM finds it. docs/writing-a-pass.md tells how to go on."""
    if not NAME.fullmatch(name):
        raise UserError(f"pass name {name!r}; accepted: small letters, digits and single hyphens, as my-pass")
    if name in known_passes():
        raise UserError(f"pass name {name!r} is taken; accepted: a new one")
    if graph not in FILES:
        raise UserError(f"--graph is {graph!r}; accepted: {', '.join(FILES)}")
    folder = directory or Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there already; accepted: a new or empty folder")
    module = name.replace("-", "_")
    words = {"name": name, "module": module, "class_name": name.title().replace("-", "")}
    files = {"pyproject.toml": PYPROJECT} | FILES[graph]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            path = folder / file.format(module=module)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
            click.echo(f"wrote {path}")
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error}") from error
    click.echo(f"next: cd {folder} && pip install -e . && python -m pytest")
