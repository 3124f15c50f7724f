"""The vendor of docs/adding-a-vendor.md is a package of its own, and nothing in the tree knows it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sagellm.cli import capture
from sagellm.conformance.models import write_model

PACKAGE = Path(__file__).parents[2] / "examples" / "toy-vendor"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which it is installed: its folder and its entry points are on the path."""
    site = tmp_path_factory.mktemp("site")
    info = site / "toy_vendor-0.1.0.dist-info"
    info.mkdir()
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
             for group, entries in project["entry-points"].items()]  # fmt: skip
    (info / "entry_points.txt").write_text("".join(lines))
    path = os.pathsep.join([str(site), str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def run(env, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sagellm", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_it_compiles_and_passes_the_proofs(installed, tmp_path):
    folder = write_model(tmp_path / "qwen3", "qwen3")
    done = run(installed, "verify-backend", "toy", "--model", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calls of 2 kinds bound" in done.stdout and "tokens equal" in done.stdout
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    prompts = ("compile", "--target", "toy", "--prompts", tmp_path / "prompts.txt", "--emit", "code")
    assert "toychip.silu_and_mul(m, gate_up)" in run(installed, *prompts).stdout


def test_an_error_in_its_text_is_noticed(installed):
    done = run(installed, "verify-backend", "toy", "--mutations", 40)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_not_there_where_it_is_not_installed():
    done = capture(["verify-backend", "toy"])
    assert done.code == 2 and "toy" in done.stderr and len(done.stderr.splitlines()) == 1
