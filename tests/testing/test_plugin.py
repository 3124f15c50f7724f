"""The pytest plug-in for `*.mlir` files, as people use it outside this tree: a folder with a pass and its test."""

import sys

import filecheck.matcher  # noqa: F401
import pytest

import sagellm.backends.cpu
import sagellm.cli.opt  # noqa: F401  pytester forgets what is imported first inside it, so all is imported here

pytest_plugins = ["pytester"]

PASS = """
from dataclasses import dataclass
from typing import ClassVar
from sagellm.ir.dialects import nn
from sagellm.ir.edit import replace
from sagellm.passes.driver import Pass, rewrites

@dataclass(frozen=True)
class NoSilu(Pass):
    '''Drops every silu. Declines nothing.'''
    name: ClassVar[str] = "no-silu"
    graph: ClassVar[str] = "model"

    @rewrites(nn.Silu)
    def drop(self, op, graph, context):
        self.applied(context, op, "dropped")
        replace(op, [op.x])
"""
MODULE = """
builtin.module {
  nn.func @f(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %act = nn.silu %x : tensor<?x8xf32>
    nn.return %act
  }
}
"""
OPT = "sagellm opt %s --load-pass %S/my_pass.py:NoSilu -p no-silu"


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in a folder that holds the pass and one file with these lines above the module."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plug-ins would be imported every time

    def run(*lines: str, name: str = "my_pass.mlir"):
        pytester.path.joinpath("my_pass.py").write_text(PASS)
        pytester.path.joinpath(name).write_text("\n".join(lines) + MODULE)
        return pytester.runpytest_inprocess("-p", "sagellm.testing.plugin", "-p", "no:cacheprovider")

    return run


def text(result) -> str:
    return result.stdout.str()


def test_each_run_line_is_a_test(run):
    result = run(
        f"// RUN: {OPT} --remarks | filecheck %s",
        "// RUN: sagellm opt %s | filecheck %s --check-prefix BEFORE",
        "// CHECK: // no-silu: applied at %act = nn.silu",
        "// CHECK-NOT: nn.silu",
        "// BEFORE: nn.silu",
    )
    result.assert_outcomes(passed=2)


def test_it_works_in_a_folder_of_its_own_with_a_fresh_interpreter(pytester):
    pytester.path.joinpath("my_pass.py").write_text(PASS)
    pytester.path.joinpath("conftest.py").write_text('pytest_plugins = ["sagellm.testing.plugin"]\n')
    pytester.path.joinpath("a.mlir").write_text(
        f"// RUN: {OPT} | filecheck %s\n// CHECK-NOT: nn.silu\n{MODULE}"
    )
    pytester.runpytest_subprocess("a.mlir").assert_outcomes(passed=1)


def test_a_failure_shows_the_line_the_mismatch_and_the_output(run):
    result = run(f"// RUN: {OPT} | filecheck %s", "// CHECK: nn.silu %x")
    result.assert_outcomes(failed=1)
    for shown in (
        f"my_pass.mlir:1: RUN: {OPT} | filecheck %s",
        'my_pass.mlir:2: error: Couldn\'t match "nn.silu %x".',
        "--- what it read ---",
        "    nn.return %x",
    ):
        assert shown in text(result)


def test_a_command_that_fails_shows_what_it_said(run):
    result = run("// RUN: sagellm opt %s -p no-silu | filecheck %s", "// CHECK: nn")
    result.assert_outcomes(failed=1)
    assert "failed with exit status 2\nsagellm opt: error: unknown pass 'no-silu'; accepted: " in text(result)


def test_not_wants_a_failure_and_its_words_go_down_the_pipe(run):
    run(
        "// RUN: not sagellm opt %s -p no-silu 2>&1 | filecheck %s", "// CHECK: unknown pass 'no-silu'"
    ).assert_outcomes(passed=1)
    result = run("// RUN: not sagellm opt %s", name="other.mlir")
    assert "succeeded, but should fail" in text(result)


def test_not_does_not_want_a_crash(run, pytester):
    pytester.path.joinpath("bad.py").write_text(PASS.replace("replace(op, [op.x])", "op.nonsense()"))
    result = run("// RUN: not sagellm opt %s --load-pass %S/bad.py:NoSilu -p no-silu")
    result.assert_outcomes(failed=1)
    assert "crashed" in text(result) and "has no attribute 'nonsense'" in text(result)


def test_output_can_go_through_several_commands(run):
    run(
        "// RUN: sagellm opt %s --generic | sagellm opt - | filecheck %s", "// CHECK: %act = nn.silu %x"
    ).assert_outcomes(passed=1)


def test_long_lines_go_on_behind_a_backslash(run):
    run(
        "// RUN: sagellm opt %s \\",
        "// RUN:     --generic \\",
        "// RUN:     | filecheck %s",
        '// CHECK: "nn.silu"',
    ).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sagellm opt %s > out", "the RUN line has '>'; accepted of a shell: | and 2>&1"),
        ("sagellm opt %s && filecheck %s", "the RUN line has '&&'"),
        ("sagellm opt %s | grep nn", "unknown command 'grep'; accepted: sagellm, filecheck"),
        ("sagellm opt '%s", "cannot read the RUN line: No closing quotation"),
        ("sagellm opt %s | filecheck", "filecheck : Missing argument: check-file"),
        ("sagellm opt %s | filecheck %s", "No check strings found with prefix CHECK"),
    ],
)
def test_what_is_wrong_with_a_run_line_is_said(run, line, said):
    result = run(f"// RUN: {line}")
    result.assert_outcomes(failed=1)
    assert said in text(result)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("// RUN: xdsl-opt %s | filecheck %s",),
        ("// RUN: mlir-opt %s -o /tmp/sagellm-test | FileCheck %s",),
    ],
)
def test_other_peoples_files_are_left_alone(run, lines):
    run(*lines).assert_outcomes()


def test_the_plug_in_alone_imports_neither_torch_nor_xdsl(pytester):
    done = pytester.run(
        sys.executable,
        "-c",
        "import sagellm.testing.plugin, sys; assert not {'torch', 'xdsl'} & set(sys.modules)",
    )
    assert done.ret == 0, done.stderr.str()
