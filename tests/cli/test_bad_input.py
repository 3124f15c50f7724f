"""Bad input ends with one line that names the thing, the value and what would be accepted; status 2, no traceback."""

import json
import shutil
import subprocess
import sys

import pytest

from sagellm.cli import capture

pytest_plugins = ["checkpoints"]


@pytest.fixture(scope="module")
def model(text_checkpoint):
    return text_checkpoint


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model, to be broken."""
    return shutil.copytree(model, tmp_path / "broken")


def refused(*args: str, stdin: str = "") -> str:
    done = capture(args, stdin)
    assert done.code == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sagellm "), done.stderr
    return lines[0]


def edit(folder, **fields):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))


def test_missing_folder():
    assert "no such folder" in refused("run", "-m", "./nowhere", "hello")


def test_missing_shard(broken):
    weights = broken / "model.safetensors"
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    assert "model-00001-of-00002.safetensors" in refused("run", "-m", str(broken), "hello")


def test_truncated_shard(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("run", "-m", str(broken), "hello")


def test_config_without_a_needed_field(broken):
    edit(broken, hidden_size="drop")
    assert "hidden_size" in refused("run", "-m", str(broken), "hello")


def test_unknown_architecture(broken):
    edit(broken, architectures=["MambaForCausalLM"])
    line = refused("run", "-m", str(broken), "hello")
    assert "MambaForCausalLM" in line and "LlamaForCausalLM" in line


def test_unknown_rope_type(broken):
    edit(broken, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    line = refused("run", "-m", str(broken), "hello")
    assert "spiral" in line and "llama3" in line


def test_tensor_of_the_wrong_shape(broken):
    edit(broken, intermediate_size=97)
    line = refused("run", "-m", str(broken), "hello")
    assert "gate_proj" in line and "97" in line


def test_pickle_checkpoint(broken):
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in refused("run", "-m", str(broken), "hello")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["", "hello"], "empty"),
        (["a " * 3000], "tokens; accepted: at most"),
        (["hello", "--temperature", "-1"], "temperature is -1.0"),
        (["hello", "--temperature", "nan"], "temperature is nan"),
        (["hello", "--top-p", "0"], "top_p is 0"),
        (["hello", "--top-k", "-3"], "top_k is -3"),
        (["hello", "--min-p", "1.5"], "min_p is 1.5"),
        (["hello", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["hello", "--max-tokens", "0"], "max_tokens is 0"),
        (["hello", "--max-tokens", "many"], "many"),
        (["hello", "--stop", ""], "stop is"),
        (["hello", "-p", "no-such-pass"], "unknown pass 'no-such-pass'"),
        (["hello", "-p", "cleanup{depth=3}"], "unknown option of pass cleanup 'depth'"),
        (["hello", "-p", "cleanup{"], "pipeline 'cleanup{'"),
        (["hello", "--target", "abacus"], "unknown target 'abacus'"),
        (["hello", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["hello", "--block-size", "0"], "block_size is 0"),
        (["hello", "--max-length", "100000"], "max_length is 100000"),
        (["hello", "--file", "prompts.txt"], "--file"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["--unknown-option"], "--unknown-option"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_run_refuses(model, args, said):
    assert said in refused("run", "-m", str(model), *args)


def test_an_empty_file_of_prompts(model, tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    assert "no prompt" in refused("run", "-m", str(model), "--file", str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot read requests"),
        ("{}", "accepted: a list"),
        ('[{"text": "x"}]', "no prompt"),
        ('[{"prompt": 7}]', "prompt is 7"),
        ('[{"prompt": []}]', "empty"),
        ('[{"prompt": [99999]}]', "token id 99999"),
        ('[{"prompt": "x", "colour": 1}]', "unknown 'colour'"),
        ('[{"prompt": "x", "temperature": "hot"}]', "temperature is 'hot'"),
    ],
)
def test_compile_refuses_requests(model, tmp_path, content, said):
    file = tmp_path / "requests.json"
    file.write_text(content)
    assert said in refused("compile", "-m", str(model), "--requests", str(file))


def test_compile_wants_prompts(model):
    assert "--prompts" in refused("compile", "-m", str(model))


def test_malformed_text_names_line_and_column(tmp_path):
    file = tmp_path / "bad.mlir"
    file.write_text("builtin.module {\n  nn.func @f() {\n    %a = nn.explode\n  }\n}\n")
    assert "bad.mlir:4:3: Operation nn.explode is not registered" in refused("opt", str(file))
    assert "bad.mlir:4:3: Operation nn.explode" in refused("replay", str(file))


def test_no_traceback_from_the_installed_command(tmp_path):
    command = [sys.executable, "-m", "sagellm", "run", "-m", "./nowhere", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
