"""The command line's frame, `sagellm opt` and `sagellm passes`. What passes do to graphs is in tests/filecheck."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from sagellm import __version__
from sagellm.cli import COMMANDS, capture
from sagellm.cli.opt import run_opt
from sagellm.cli.passes import WIDTH
from sagellm.errors import UserError
from sagellm.ir.dialects import DIALECTS
from sagellm.ir.graph import IRGraph
from sagellm.passes import DEFAULT, PASSES
from sagellm.passes.driver import Pass, parse

FILECHECK = Path(__file__).parent.parent / "filecheck"
NORMS = """builtin.module {
  nn.func @f(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %a = nn.rms_norm %x, @w {eps = 1.0e-06} : tensor<?x8xf32>
    %b = nn.rms_norm %x, @w {eps = 1.0e-06} : tensor<?x8xf32>
    %s = nn.add %a, %b : tensor<?x8xf32>
    nn.return %s
  }
}
"""
THREE_NORMS = NORMS.replace("add %a, %b", "add %b, %b")
LOUD_PASS = """
from dataclasses import dataclass
from typing import ClassVar
from sagellm.passes.driver import Pass

@dataclass(frozen=True)
class Loud(Pass):
    '''Says its word.

    Declines nothing.
    '''
    word: str = "boo"
    times: int = 1
    name: ClassVar[str] = "loud"
    graph: ClassVar[str] = "model"

    def apply(self, graph, context):
        self.applied(context, "everywhere", " ".join([self.word] * self.times))
"""


@pytest.fixture
def loud(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD_PASS)
    return f"{tmp_path / 'loud.py'}:Loud"


# the frame


def test_help_lists_the_commands_and_imports_none_of_them():
    code = (
        "import sys; from sagellm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, modules = done.stdout.splitlines()
    assert all(any(line.split()[:1] == [name] for line in text) for name in COMMANDS)
    loaded = set(modules.split())
    assert not loaded & {"torch", "numpy", "xdsl", "attrs", "networkx", "rich", "transformers"}
    assert {m for m in loaded if m.startswith("sagellm")} == {"sagellm", "sagellm.cli", "sagellm.errors"}


def test_version():
    assert capture(["--version"]) == (0, f"sagellm, version {__version__}\n", "")


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_is_what_one_gets_without_a_command(args):
    done = capture(args)
    assert done.code == 0 and "passes" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["optimise"], f"sagellm: error: unknown command 'optimise'; accepted: {', '.join(COMMANDS)}"),
        (["--zzz"], "sagellm: error: No such option"),
        (["opt", "--zzz"], "sagellm opt: error: No such option"),
        (["opt", "a.mlir", "b.mlir"], "sagellm opt: error: Got unexpected extra argument (b.mlir)"),
        (
            ["opt", "-", "-p", "x"],
            f"sagellm opt: error: unknown pass 'x'; accepted: {', '.join(sorted(PASSES))}",
        ),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(args, said):
    done = capture(args)
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(said)


def test_debug_shows_the_traceback_too(monkeypatch):
    shown = capture(["--debug", "opt", "no/such/file"])
    assert shown.code == 2 and "Traceback" in shown.stderr
    assert shown.stderr.endswith(
        "sagellm opt: error: cannot read 'no/such/file': No such file or directory\n"
    )
    monkeypatch.setenv("SAGELLM_DEBUG", "1")
    assert "Traceback" in capture(["opt", "no/such/file"]).stderr


def test_an_interrupt_ends_quietly(monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("sagellm.cli.opt._read", interrupted)
    assert capture(["opt", "file"]) == (130, "", "")


def test_a_reader_that_goes_away_ends_it_quietly():
    code = "from sagellm.cli import main; main(['passes'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (130, b"")


def test_two_streams_or_one():
    assert capture(["opt", "nowhere"]).stdout == ""
    assert "cannot read 'nowhere'" in capture(["opt", "nowhere"], merge=True).stdout


# opt


def test_a_module_on_stdin_is_printed_again():
    assert run_opt([], NORMS) == (0, NORMS, "")
    assert run_opt(["-"], NORMS) == (0, NORMS, "")


def test_remarks_are_comments_so_that_the_output_is_a_module_still():
    done = run_opt(["-p", "cleanup", "--remarks"], NORMS)
    assert done.stdout.startswith("// cleanup: applied at %b = nn.rms_norm (operation 2 of @f)")
    assert IRGraph.parse(done.stdout).count("nn.rms_norm") == 1


def test_output_goes_to_a_file_only_when_all_went_well(tmp_path):
    written = tmp_path / "out.mlir"
    assert run_opt(["-p", "cleanup", "-o", str(written)], NORMS) == (0, "", "")
    assert IRGraph.read(written).count("nn.rms_norm") == 1
    assert (
        run_opt(["--split-input-file", "-o", str(tmp_path / "none")], f"{NORMS}// -----\nnonsense").code == 2
    )
    assert not (tmp_path / "none").exists()
    refused = run_opt(["-o", str(tmp_path)], NORMS)
    assert refused.stderr == f"sagellm opt: error: cannot write '{tmp_path}': Is a directory\n"


def test_a_file_of_several_modules_stays_one():
    both = f"{NORMS}// -----\n{THREE_NORMS}"
    assert run_opt(["--split-input-file"], both).stdout == both
    cleaned = run_opt(["--split-input-file", "-p", "cleanup"], both).stdout
    assert [part.count("rms_norm") for part in cleaned.split("// -----")] == [1, 1]


def test_between_passes_shows_the_module_before_each():
    out = run_opt(["-p", "cleanup,kernel-fusion", "--print-between-passes"], NORMS).stdout
    before, between = out.split("// IR before cleanup\n")[1].split("// IR before kernel-fusion\n")
    assert before.count("nn.rms_norm") == 2 and between.split("builtin.module")[1].count("nn.rms_norm") == 1


def test_a_pass_that_breaks_the_module_is_named(tmp_path):
    (tmp_path / "bad.py").write_text(
        LOUD_PASS.replace(
            "self.applied(",
            "op = list(graph.walk())[1]; op.operands = [list(graph.walk())[2].results[0]]; self.applied(",
        )
    )
    args = ["-p", "loud", "--load-pass", f"{tmp_path / 'bad.py'}:Loud"]
    done = run_opt([*args, "--print-between-passes"], NORMS)
    assert done.code == 2 and done.stdout.startswith("// IR before loud\n")
    assert done.stderr == (
        "sagellm opt: error: <stdin>: after pass loud: %b = nn.rms_norm (operation 2 of @f): "
        "uses a value before it is defined (made by nn.add)\n"
    )
    assert run_opt([*args, "--verify", "off"], NORMS).code == 0


def test_batch_and_model_passes_see_one_module():
    step = (FILECHECK / "passes" / "prefix_dedup.mlir").read_text().split("// -----")[0]
    module = step.rstrip().removesuffix("}") + NORMS.removeprefix("builtin.module {\n")
    module = module.replace("@model", "@f").replace("@sample", "@f")
    graph = IRGraph.parse(run_opt(["-p", "cleanup,prefix-dedup"], module).stdout)
    assert (graph.count("batch.share"), graph.count("nn.rms_norm")) == (1, 1)


def test_emitted_code_is_a_python_module():
    model = (FILECHECK / "dialects" / "nn.mlir").read_text()
    model = model.replace("nn.top_k_top_p", "nn.top_p")  # which a pass makes only for who has both in one
    done = run_opt(["--emit", "code", "-p", "cleanup", "--remarks"], model)
    assert done.code == 0 and done.stdout.startswith("# cleanup: applied")
    functions: dict = {}
    exec(compile(done.stdout, "emitted", "exec"), functions)
    assert callable(functions["layers_dense"]) and callable(functions["sample"])


def test_every_operation_is_in_its_dialects_round_trip_test():
    for dialect in DIALECTS:
        text = (FILECHECK / "dialects" / f"{dialect.name}.mlir").read_text()
        missing = [
            op.name for op in dialect.operations if not re.search(rf"^\s*[^/]*\b{op.name} ", text, re.M)
        ]
        assert not missing, f"{dialect.name}.mlir lacks {missing}"


# passes


def test_each_pass_says_what_it_does_and_when_it_declines():
    done = capture(["passes"])
    assert done.code == 0 and max(map(len, done.stdout.splitlines())) <= WIDTH
    *entries, last = done.stdout.strip().split("\n\n")
    assert last == f"default pipeline:\n    {DEFAULT}"
    ours = entries[: len(PASSES)]
    assert [entry.split(":")[0] for entry in ours] == list(PASSES)
    assert all(" rewrites " in entry and "\n    Declines " in entry for entry in ours)


def test_the_list_as_json(loud):
    listed = json.loads(capture(["passes", "--json", "--load-pass", loud]).stdout)
    assert listed["default"] == DEFAULT
    assert listed["passes"][-1] == {
        "name": "loud",
        "graph": "model",
        "does": ["Says its word."],
        "declines": "Declines nothing.",
        "options": [
            {"name": "word", "type": "str", "default": "boo"},
            {"name": "times", "type": "int", "default": 1},
        ],
    }


def test_a_pass_from_a_file(loud):
    assert "    option times: int, default 1\n" in capture(["passes", "--load-pass", loud]).stdout
    done = run_opt(["--load-pass", loud, "-p", "loud{word=hey times=2}", "--remarks"], NORMS)
    assert done.stdout == f"// loud: applied at everywhere: hey hey\n{NORMS}"


def test_passes_of_installed_packages(tmp_path, monkeypatch):
    (tmp_path / "louder.py").write_text(LOUD_PASS)
    installed = tmp_path / "louder-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: louder\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[sagellm.passes]\nloud = louder:Loud\nbroken = no_such_module:Pass\ncleanup = louder:Loud\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    listed = capture(["passes"]).stdout
    assert "\nloud: rewrites the model graph" in listed
    assert "\nbroken\n    cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'\n" in listed
    assert "// loud: applied" in run_opt(["-p", "loud", "--remarks"], NORMS).stdout
    assert (
        "// cleanup: applied" in run_opt(["-p", "cleanup", "--remarks"], NORMS).stdout
    )  # ours cannot be replaced


# options of passes, as text


@dataclass(frozen=True)
class Tuned(Pass):
    word: str = "lru"
    limit: float = 0.5
    count: int = 3
    fast: bool = False
    name: ClassVar[str] = "tuned"
    graph: ClassVar[str] = "model"


@dataclass(frozen=True)
class Untypical(Pass):
    sizes: tuple = ()
    name: ClassVar[str] = "tuned"
    graph: ClassVar[str] = "model"


def read(text: str, kind: type[Pass] = Tuned) -> Pass:
    return parse(text, lambda: {"tuned": lambda: kind}).passes[0]


@pytest.mark.parametrize("made", [Tuned(), Tuned("two words", 1e-6, -1, True), Tuned("3", 2.0, 0, False)])
def test_a_pass_with_options_reads_back_from_its_text(made):
    assert read(str(made)) == made


def test_options_may_be_written_short():
    assert read("tuned{fast limit=2 word=s3-fifo}") == Tuned("s3-fifo", 2.0, 3, True)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("tuned{count=1.5}", Tuned, "option count of pass tuned is '1.5'; accepted: int"),
        ("tuned{limit=much}", Tuned, "option limit of pass tuned is 'much'; accepted: float"),
        ("tuned{sizes=1}", Untypical, "unknown type of option sizes of pass tuned 'tuple'; accepted: int"),
    ],
)
def test_options_of_another_type_are_refused(text, kind, said):
    with pytest.raises(UserError, match=re.escape(said)):
        read(text, kind)
