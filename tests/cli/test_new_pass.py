"""`sagellm new-pass` writes a package whose own tests pass."""

import forked
import pytest

from sagellm.cli import capture


@pytest.mark.parametrize("graph", ["model", "batch"])
def test_a_new_pass_passes_its_own_tests(graph, tmp_path):
    folder = tmp_path / "pkg"
    code, out, err = capture(["new-pass", "halve-it-2", "--graph", graph, "-d", str(folder)])
    assert (code, err) == (0, "")
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["halve_it_2.mlir", "halve_it_2.py", "pyproject.toml", "test_halve_it_2.py"]
    assert out.endswith(f"next: cd {folder} && pip install -e . && python -m pytest\n")
    assert 'halve-it-2 = "halve_it_2:HalveIt2"' in (folder / "pyproject.toml").read_text()
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    run = forked.python(code, "-q", "-p", "no:cacheprovider", ".", cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ("4 passed" if graph == "model" else "3 passed") in run.stdout, "the FileCheck test and the others"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["My Pass"], "pass name 'My Pass'; accepted: small letters"),
        (["cleanup"], "pass name 'cleanup' is taken; accepted: a new one"),
        (["fine", "--graph", "no"], "--graph is 'no'; accepted: model, batch"),
        (["fine", "-d", "."], "'.' is there already; accepted: a new or empty folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    code, out, err = capture(["new-pass", *arguments])
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
