"""Weights are read from safetensors only, and what is wrong with a folder is said before any is read."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sagellm.errors import UserError
from sagellm.models.checkpoint import Checkpoint
from sagellm.models.hub import BUILTIN, resolve

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def single(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def refusal(folder, expected=None):
    with pytest.raises(UserError) as refused:
        Checkpoint(folder).check(expected or {})
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_that_transformers_saved_is_read_back(request, model, layout):
    checkpoint = Checkpoint(request.getfixturevalue(layout))
    checkpoint.check(shapes(model))
    assert checkpoint.names() == tuple(sorted(model.state_dict()))
    for name, tensor in model.state_dict().items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == torch.bfloat16
        assert torch.equal(checkpoint.read(name), tensor)


def test_tensors_that_nobody_expects_are_no_error(single):
    Checkpoint(single).check({"model.norm.weight": (64,)})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]
)
def test_dtypes_are_those_of_the_file(tmp_path, dtype):
    save_file({"x": torch.ones(3).to(dtype)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).dtype("x") == dtype
    assert Checkpoint(tmp_path).read("x").dtype == dtype


def test_a_missing_tensor_is_named_with_the_file_that_lacks_it(single, model):
    said = refusal(single, {**shapes(model), "model.extra": (1,)})
    assert said == f"tensor 'model.extra' is missing from {single / 'model.safetensors'}"
    assert refusal(single, {"a": (1,), "b": (1,), "c": (1,)}).endswith("(and 2 more)")
    with pytest.raises(UserError, match="tensor 'a' is missing"):
        Checkpoint(single).read("a")


def test_a_tensor_that_the_index_promises_and_its_shard_lacks_is_named_with_the_shard(sharded, model):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in shards if shard != index["weight_map"]["model.norm.weight"]
    )
    (sharded / INDEX).write_text(json.dumps(index))
    said = refusal(sharded, shapes(model))
    assert "'model.norm.weight' is missing from" in said
    assert index["weight_map"]["model.norm.weight"] in said
    assert INDEX in refusal(sharded, {"model.extra": (1,)})


def test_a_wrong_shape_is_named_with_both_shapes(single):
    said = refusal(single, {"model.norm.weight": (65,)})
    assert "'model.norm.weight'" in said
    assert said.endswith("has shape [64]; accepted: [65]")


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    said = refusal(sharded)
    assert shard.name in said
    assert INDEX in said


def test_a_shard_cut_short_is_named_with_its_sizes(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    said = refusal(sharded)
    assert f"{shard} has {len(whole) - 10} bytes; accepted: {len(whole)} bytes" in said


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", b"\2" + b"\0" * 7 + b"[]"],
)
def test_a_file_that_is_no_safetensors_is_named_with_its_size(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    said = refusal(tmp_path)
    assert f"model.safetensors ({len(content)} bytes) is not a safetensors file" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {}}', "weight_map is missing, empty"),
        ('{"weight_map": ["a"]}', "no object"),
        ('{"weight_map": {"a": 1}}', "the file of tensor 'a' is 1"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "accepted: a file name in the folder"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path, text, said):
    (tmp_path / INDEX).write_text(text)
    assert said in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no weights in" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_are_refused_unread(tmp_path, name):
    torch.save({"x": torch.ones(1)}, tmp_path / name)
    said = refusal(tmp_path)
    assert name in said
    assert "only safetensors" in said


def test_a_folder_and_the_builtin_model_resolve_without_the_hub(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("builtin") == BUILTIN
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model").samefile(tmp_path / "org" / "model")


@pytest.mark.parametrize(
    "path", ["", "./x", "../x", "/x/y", "~/no such", "a/b/c", "nowhere", "org/model/", "a b/c", "\0"]
)
def test_what_looks_like_a_path_and_is_not_there_is_no_such_folder(path):
    with pytest.raises(UserError, match="no such folder"):
        resolve(path)


def test_a_file_is_not_a_model(single):
    with pytest.raises(UserError, match="is a file; accepted: a folder"):
        resolve(str(single / "config.json"))


def resolve_in_new_process(model, **environment):
    code = (
        "import sys\n"
        "from sagellm.errors import UserError\n"
        "from sagellm.models.hub import resolve\n"
        "try: print(resolve(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", code, model]
    return subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    closed_port = "http://127.0.0.1:9"
    for environment in ({"HF_ENDPOINT": closed_port}, {"HF_HUB_OFFLINE": "1"}):
        said = resolve_in_new_process("Qwen/Qwen2.5-0.5B", HF_HOME=str(tmp_path), **environment)
        assert said.startswith(
            "'Qwen/Qwen2.5-0.5B' is no folder here and not cached, and the Hugging Face hub"
        )
        assert "accepted: a folder, 'builtin'" in said
        assert "\n" not in said


def test_a_cached_copy_is_used_offline(tmp_path):
    cached = tmp_path / "hub" / "models--org--tiny"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert resolve_in_new_process("org/tiny", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1") == str(snapshot)
