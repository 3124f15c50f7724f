"""The vendor of docs/adding-a-vendor.md is a package of its own, and nothing in the tree knows it."""

import tomllib
from pathlib import Path

import forked
import pytest

from sagellm.cli import capture
from sagellm.conformance.models import write_model

PACKAGE = Path(__file__).parents[2] / "examples" / "toy-vendor"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> list[Path]:
    """What is on the path where it is installed: its entry points and its folder."""
    site = tmp_path_factory.mktemp("site")
    info = site / "toy_vendor-0.1.0.dist-info"
    info.mkdir()
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
             for group, entries in project["entry-points"].items()]  # fmt: skip
    (info / "entry_points.txt").write_text("".join(lines))
    return [site, PACKAGE]


def test_it_compiles_and_passes_the_proofs(installed, tmp_path):
    folder = write_model(tmp_path / "qwen3", "qwen3")
    done = forked.sagellm("verify-backend", "toy", "--model", folder, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calls of 2 kinds bound" in done.stdout and "tokens equal" in done.stdout
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    prompts = ("compile", "--target", "toy", "--prompts", tmp_path / "prompts.txt", "--emit", "code")
    assert "toychip.silu_and_mul(m, gate_up)" in forked.sagellm(*prompts, path=installed).stdout


def test_an_error_in_its_text_is_noticed(installed):
    done = forked.sagellm("verify-backend", "toy", "--mutations", 40, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_not_there_where_it_is_not_installed():
    done = capture(["verify-backend", "toy"])
    assert done.code == 2 and "toy" in done.stderr and len(done.stderr.splitlines()) == 1
