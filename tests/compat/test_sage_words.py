"""The mission's own words, as its pages write them; the model is the built-in one."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "compat" / "sage-llm" / "src"


def python(text, *arguments, before=(), **env):
    """A program with the distribution on its path, behind what is in `before`."""
    return forked.python(text, *arguments, path=[*before, SOURCES], env=env)


def sage(*words, **how):
    return python("from sage_llm.cli import main; main()", *words, **how)


@contextmanager
def gateway(folder, site=None):
    """A control plane on a free port, which is then the default of everyone who has this environment."""
    paths = [site, SOURCES, ROOT, os.environ.get("PYTHONPATH")]
    env = os.environ | {
        "SAGELLM_STATE": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
    }
    command = [sys.executable, "-m", "sagellm", "gateway", "--port", "0"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=folder)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.match(r"ready: .* at http://[^/]*:(\d+)/", line)
        assert found, line + process.stderr.read()
        yield {"SAGELLM_PORT_GATEWAY": found[1], "SAGELLM_STATE": str(folder)}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_the_snippets_of_the_mission(tmp_path):
    """An engine is started by the command, and a client that is told nothing asks it through the control plane."""
    with gateway(tmp_path) as env:
        started = sage(
            "llm", "engine", "start", "builtin", "--engine-kind", "sagellm", "--device", "cpu",
            "--label", "zone=a", "--extra=--core", "--extra=inline", **env,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        assert "sagellm-1 is ready" in started.stdout
        asked = python(
            "from sage.llm import UnifiedInferenceClient\n"
            "client = UnifiedInferenceClient.create()\n"
            'print(client.chat([{"role": "user", "content": "你好"}])["choices"][0]["message"])\n',
            **env,
        )
        assert asked.returncode == 0, asked.stderr
        assert "'role': 'assistant'" in asked.stdout
        inferred = sage("infer", "你好", "-n", "8", **env)
        assert inferred.returncode == 0 and inferred.stdout.strip(), inferred.stderr
        listed = sage("llm", "engine", "list", **env)
        assert "sagellm-1" in listed.stdout and "ready" in listed.stdout
        assert "sagellm-1.log" in [path.name for path in (tmp_path / "logs").iterdir()]
        assert "ready: builtin" in sage("llm", "engine", "logs", "sagellm-1", **env).stdout
        stopped = sage("llm", "engine", "stop", "sagellm-1", **env)
        assert stopped.stdout == "sagellm-1 is stopped\n"
        assert "sagellm-1" not in sage("llm", "engine", "list", **env).stdout


def test_a_manager_and_an_engine_by_the_names_of_sage():
    found = python(
        "from sage.llm.control_plane import ControlPlaneManager\n"
        "from sage.llm.engines.sagellm import SageLLMEngine\n"
        "manager = ControlPlaneManager()\n"
        'info = manager.register_engine("sagellm", SageLLMEngine(model="builtin", device="cpu"))\n'
        "print(info.engine_id, info.model_id, info.engine_kind)\n"
    )
    assert found.stdout == "sagellm builtin sagellm\n", found.stderr


ON_ASCEND = """
from sagellm.conformance.fake_cann.build import Unavailable
from sagellm.conformance.fake_cann.load import fake_ascend
try:
    stand_in = fake_ascend()
    stand_in.__enter__()
except Unavailable as why:
    import sys
    print("not here:", why)
    sys.exit(77)
"""
"""An Ascend 910B whose CANN is a stand-in; the rest, torch_npu's host code too, is real."""


SNIPPET = """
from sage.llm import UnifiedInferenceClient
from sage.llm.control_plane import ControlPlaneManager
from sage.llm.engines.sagellm import SageLLMEngine
from sagellm.errors import UserError

try:
    SageLLMEngine(model="builtin", device="ascend", kv_schema="fp8")
except UserError as error:
    print("refused:", error)
manager = ControlPlaneManager()
engine = SageLLMEngine(model="builtin", device="ascend", kv_schema="int8", max_length=256)
manager.register_engine("sagellm", engine)
client = UnifiedInferenceClient.create(manager=manager)
answer = client.chat([{"role": "user", "content": "你好"}], max_tokens=4)
backend, dtype = engine.get_capability().backend, engine.get_kv_schema().dtype
print("answered:", answer["choices"][0]["message"]["role"], backend, dtype)
"""


@pytest.fixture(scope="module")
def on_ascend():
    """What the snippet prints there, without what torch_npu prints when it is imported."""
    found = python(ON_ASCEND + SNIPPET)
    if found.returncode == 77:
        pytest.skip(found.stdout)
    assert found.returncode == 0, found.stderr
    return [line for line in found.stdout.splitlines() if not line.startswith("Warning: ASCEND")]


def test_a_chip_without_fp8_says_what_it_can_do_and_serves_with_that(on_ascend):
    refused, answered = on_ascend
    assert refused.startswith("refused: kv dtype 'fp8_e4m3' for ascend") and "it has int8" in refused
    assert answered == "answered: assistant ascend int8"


def test_the_command_starts_an_engine_for_ascend(on_ascend, tmp_path):
    """The engine's process finds the stand-in as it starts."""
    begin = "".join(f"    {line}\n" for line in ON_ASCEND.splitlines())
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nif 'serve' in sys.orig_argv:\n{begin}")
    with gateway(tmp_path, site=tmp_path) as env:
        started = sage(
            "llm", "engine", "start", "builtin", "--engine-kind", "sagellm", "--device", "ascend",
            "--extra=--core", "--extra=inline", "--max-model-len", "128", **env,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        logs = sage("llm", "engine", "logs", "sagellm-1", **env).stdout
        assert "ready: builtin on ascend at" in logs
        assert sage("infer", "你好", "-n", "4", **env).returncode == 0
        assert sage("llm", "engine", "stop", "sagellm-1", **env).returncode == 0


@pytest.mark.parametrize(
    "words, status, said",
    [
        (["llm", "nonsense"], 2, "Usage: sage llm"),
        (["nonsense"], 2, "unknown command 'nonsense'; accepted: llm, infer"),
        (["llm", "--help"], 0, "sage llm engine start MODEL"),
    ],
)
def test_other_words(words, status, said):
    found = sage(*words)
    assert found.returncode == status and said in found.stdout + found.stderr


def test_other_words_go_to_an_installed_sage(tmp_path):
    """A distribution `isage` with a command `sage` and a package `sage.flow` keeps both."""
    (tmp_path / "sage" / "flow").mkdir(parents=True)
    (tmp_path / "sage" / "flow" / "__init__.py").write_text("HERE = 1\n")
    (tmp_path / "isage_cli.py").write_text("import sys\ndef main(): print('theirs', *sys.argv[1:])\n")
    info = tmp_path / "isage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: isage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nsage = isage_cli:main\n")
    found = sage("studio", "start", before=[tmp_path])
    assert found.stdout == "theirs studio start\n", found.stderr
    found = python("import sage.flow, sage.llm; print(sage.flow.HERE, sage.llm.__name__)", before=[tmp_path])
    assert found.stdout == "1 sage.llm\n", found.stderr


def test_without_a_control_plane_the_client_says_how_to_get_one():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        found = sage("infer", "hello", SAGELLM_PORT_GATEWAY=str(silent.getsockname()[1]))
    assert found.returncode == 2 and "sagellm gateway" in found.stderr and len(found.stderr.splitlines()) == 1
