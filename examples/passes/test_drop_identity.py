"""The example pass removes what it should, and a decode step means the same without it."""

import re
import shlex
from pathlib import Path

import pytest
from drop_identity import DropIdentity

from sagellm import backends
from sagellm.cli import capture
from sagellm.ir.reference import Forwarded, LogicalRows
from sagellm.meaning.check import check_model_passes
from sagellm.models.config import load_config
from sagellm.models.decoder import build_model
from sagellm.models.hub import BUILTIN
from sagellm.passes.driver import PassContext, Pipeline

HERE = Path(__file__).parent
DECODES = LogicalRows((Forwarded(0, range(5, 6), (7,), 6, (5,)), Forwarded(1, range(2, 3), (4,), 3, (2,))))
"""Two sequences with one new token each, at positions 5 and 2; both want their next token."""


@pytest.fixture
def context():
    return PassContext(backends.load("cpu").capability)


def model(*phases):
    return build_model(load_config(BUILTIN), "float32", phases)


def test_a_decode_step_loses_the_choice_of_rows(context):
    graph = model("decode")
    Pipeline([DropIdentity()]).run(graph, "model", context, "full")
    assert graph.count("nn.select_outputs") == 0
    assert [remark.done for remark in context.remarks] == [True]


@pytest.mark.parametrize(
    ("phases", "options"), [(("prefill",), {}), (("decode", "prefill"), {}), (("decode",), {"padded": True})]
)
def test_it_declines_where_some_rows_get_no_token(context, phases, options):
    graph = model(*phases)
    Pipeline([DropIdentity(**options)]).run(graph, "model", context, "full")
    assert graph.count("nn.select_outputs") == 1
    assert [remark.done for remark in context.remarks] == [False]


def test_a_decode_step_computes_the_same_without_it(context):
    check_model_passes(model("decode"), Pipeline([DropIdentity()]), context, rows=DECODES)


def test_the_page_shows_this_pass_and_what_it_prints(monkeypatch):
    """docs/writing-a-pass.md: its Python and its CHECK lines stand in these files, its commands print what it says."""
    monkeypatch.chdir(HERE.parent.parent)
    page = Path("docs/writing-a-pass.md").read_text()
    files = "".join(path.read_text() for path in HERE.iterdir() if path.is_file())
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "console", "mlir", "toml"}
    for kind, block in blocks:
        if kind == "python":
            assert block in files
        elif kind == "mlir":
            assert all(line in files for line in block.splitlines())
        elif kind == "console":
            command, output = block.split("\n", 1)
            done = capture(shlex.split(command.removeprefix("$ sagellm ")))
            assert (done.code, done.stdout) == (0, output)
