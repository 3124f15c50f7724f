"""Settings: where they come from, which go first, what is said about bad ones; which KV cache may be asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from attrs import asdict, evolve, fields_dict
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm import backends
from sagellm.cli import capture
from sagellm.config import EngineConfig, resolve_kv_schema
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError
from sagellm.schemas import DTYPE_BYTES, KVCacheSchema
from sagellm.target import CapabilityDescriptor

pytest_plugins = ["checkpoints"]

FILE = Path(__file__).parent.parent / "config" / "engines" / "sagellm.yaml"
VARIABLES = {name: f"SAGELLM_{name.upper()}" for name in fields_dict(EngineConfig)}


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "engine.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refused(*args, **settings) -> str:
    with pytest.raises(UserError) as error:
        EngineConfig.load(*args, **settings)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_the_example_file_holds_every_default():
    assert EngineConfig.load(FILE, {}) == EngineConfig()
    assert set(yaml.safe_load(FILE.read_text())) == set(fields_dict(EngineConfig))


def test_every_setting_of_the_example_file_is_commented():
    for line in FILE.read_text().splitlines():
        assert not line or "#" in line


def test_configuration_needs_neither_torch_nor_xdsl():
    code = "import sys, sagellm.config; print({'torch', 'xdsl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


SETTINGS = st.fixed_dictionaries({}, optional={
    "model": st.sampled_from(["builtin", "some/model", "null", "7", "true"]),
    "target": st.sampled_from(["cpu", "auto", "ascend"]),
    "dtype": st.sampled_from(["auto", "float16", "bf16"]),
    "kv_dtype": st.sampled_from(["auto", "fp8", "int8", "fp32"]),
    "pipeline": st.sampled_from(["", "cleanup", "kernel-fusion,pack-weights"]),
    "block_size": st.integers(1, 512),
    "max_length": st.none() | st.integers(1, 10**6),
    "order": st.sampled_from(["fcfs", "priority", "deadline"]),
    "kv_memory_fraction": st.floats(1e-9, 1),
    "host_kv_gib": st.floats(0, 1e4),
    "prefix_caching": st.booleans(),
    "core": st.sampled_from(["inline", "process"]),
    "max_restarts": st.integers(0, 9),
    "seed": st.integers(0, 2**63),
    "record": st.sampled_from(["steps", "/tmp/x y"]),
    "verify": st.sampled_from(["off", "weak", "full"]),
})  # fmt: skip


@examples(60)
@given(SETTINGS, SETTINGS, SETTINGS)
def test_arguments_go_before_the_environment_before_the_file_before_defaults(file, variables, arguments):
    texts = {
        VARIABLES[name]: value if isinstance(value, str) else json.dumps(value)
        for name, value in variables.items()
    }
    loaded = EngineConfig.load(file, texts, **arguments)
    assert loaded == EngineConfig(**file | variables | arguments)


def test_files_are_yaml_or_json(written):
    wanted = EngineConfig(block_size=8, verify="off", record="steps")
    assert EngineConfig.load(written("block_size: 8\nverify: off\nrecord: steps"), {}) == wanted
    text = '{"block_size": 8, "verify": "off", "record": "steps"}'
    assert EngineConfig.load(str(written(text, "engine.json")), {}) == wanted
    assert EngineConfig.load(written("# nothing"), {}) == EngineConfig()


def test_names_of_types_may_be_short():
    config = EngineConfig(dtype="bf16", kv_dtype="fp8")
    assert (config.dtype, config.kv_dtype) == ("bfloat16", "fp8_e4m3")
    assert EngineConfig(kv_dtype="fp16").kv_dtype == "float16"
    assert EngineConfig(kv_dtype="fp32").kv_dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": "16"}, "block_size is '16'; accepted: a whole number of at least 1"),
        ({"block_size": True}, "block_size is True; accepted: a whole number of at least 1"),
        ({"block_size": 16.0}, "block_size is 16.0; accepted: a whole number of at least 1"),
        ({"max_length": 0}, "max_length is 0; accepted: a whole number of at least 1"),
        ({"max_queue": 0}, "max_queue is 0; accepted: a whole number of at least 1"),
        ({"max_restarts": -1}, "max_restarts is -1; accepted: a whole number of at least 0"),
        ({"seed": None}, "seed is None; accepted: a whole number of at least 0"),
        ({"kv_memory_fraction": True}, "kv_memory_fraction is True; accepted: a number more than 0 and at most 1"),
        ({"kv_memory_fraction": 0}, "kv_memory_fraction is 0; accepted: a number more than 0 and at most 1"),
        ({"host_kv_gib": -1}, "host_kv_gib is -1; accepted: a number at least 0"),
        ({"host_kv_gib": float("inf")}, "host_kv_gib is inf; accepted: a number at least 0"),
        ({"prefix_caching": "yes"}, "prefix_caching is 'yes'; accepted: true or false"),
        ({"verify": False}, "unknown verify 'False'; accepted: off, weak, full"),
        ({"order": "lifo"}, "unknown order 'lifo'; accepted: fcfs, priority, deadline"),
        ({"core": "thread"}, "unknown core 'thread'; accepted: inline, process"),
        ({"target": 3}, "target is 3; accepted: a text that is not empty"),
        ({"model": ""}, "model is ''; accepted: a text that is not empty"),
        ({"pipeline": ["cleanup"]}, "pipeline is ['cleanup']; accepted: a text"),
        ({"record": 5}, "record is 5; accepted: a folder"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; accepted: auto, float32, bfloat16, float16"),
        ({"kv_dtype": ["fp8"]}, f"unknown kv_dtype \"['fp8']\"; accepted: auto, {', '.join(DTYPE_BYTES)}"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        EngineConfig(**settings)
    assert str(error.value) == message


def test_a_line_about_a_bad_setting_says_where_it_stands(written):
    file = written("block_size: many")
    assert refused(file, {}) == f"{file}: block_size is 'many'; accepted: a whole number of at least 1"
    assert refused(None, {"SAGELLM_MAX_LENGTH": "0"}) == (
        "SAGELLM_MAX_LENGTH: max_length is 0; accepted: a whole number of at least 1"
    )
    assert refused(None, {"SAGELLM_PREFIX_CACHING": "maybe"}) == (
        "SAGELLM_PREFIX_CACHING: prefix_caching is 'maybe'; accepted: true or false"
    )
    assert "SAGELLM_SEED is no YAML: line 1, column " in refused(None, {"SAGELLM_SEED": "]"})


def test_flags_of_the_environment_may_be_numbers():
    assert not EngineConfig.load(None, {"SAGELLM_PREFIX_CACHING": "0"}).prefix_caching
    assert EngineConfig.load({"prefix_caching": False}, {"SAGELLM_PREFIX_CACHING": "1"}).prefix_caching


def test_variables_of_other_tools_are_ignored():
    assert EngineConfig.load(None, {"SAGELLM_EXAMPLES": "9", "PATH": "/bin"}) == EngineConfig()


def test_an_unknown_setting_lists_all_and_names_the_nearest(written):
    file = written("block_sise: 16")
    line = refused(file, {})
    assert line.startswith(
        f"unknown setting in {file} 'block_sise'; accepted: block_size, check_passes, core, "
    )
    assert line.endswith("verify; did you mean block_size?")
    assert refused(None, {}, max_squences=3).endswith("did you mean max_sequences?")
    assert refused({7: 1}, {}).startswith("unknown setting in config '7'; accepted: block_size, ")
    with pytest.raises(UserError, match="unknown setting 'kv_type'"):
        EngineConfig().changed(kv_type="fp8")


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("- block_size", "engine.yaml", "holds ['block_size']; accepted: a mapping of settings"),
        ("a: [1", "engine.yaml", "is no YAML: line 1, column 6: "),
        ("seed: 1\nseed: 2", "engine.yaml", "is no YAML: line 2, column 1: key 'seed' is given twice"),
        ("seed: !!python/name:os.system", "engine.yaml", "is no YAML: line 1, column 7: could not determine"),
        ("seed: 007", "engine.yaml", "seed is '007'"),
        ("{", "engine.json", "is no JSON: "),
        ('{"seed": 1, "seed": 2}', "engine.json", "is no JSON: key 'seed' is given twice"),
        ("[" * 100000, "engine.json", "is no JSON: "),
        ("seed: 1", "engine.toml", "accepted: a file that ends in .yaml, .yml or .json"),
    ],
)
def test_a_file_that_is_no_configuration(written, text, name, said):
    assert said in refused(written(text, name), {})


def test_a_file_that_is_not_there(tmp_path):
    assert refused(tmp_path / "nowhere.yaml", {}).startswith(f"cannot read '{tmp_path}/nowhere.yaml': ")


# The KV cache.

CPU = backends.load("cpu").capability
DEFAULT = KVCacheSchema(dtype="bfloat16", block_size=16, num_layers=2, num_kv_heads=2, head_dim=64)


def chip(**what) -> CapabilityDescriptor:
    return evolve(CPU, backend="chip", any_block_size=False, **what)


def kv_refused(asked, capability=CPU) -> str:
    with pytest.raises(UserError) as error:
        resolve_kv_schema(asked, capability, DEFAULT, "bfloat16")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_kv_cache_as_the_model_has_it():
    header = {"schema": "KVCacheSchema", "version": 1}
    for asked in (
        None,
        "auto",
        "bf16",
        {},
        {"dtype": "auto"},
        {"head_dim": 64},
        DEFAULT,
        asdict(DEFAULT) | header,
    ):
        assert resolve_kv_schema(asked, CPU, DEFAULT, "bfloat16") == DEFAULT


def test_block_size_and_dtype_are_free():
    asked = {"dtype": "fp8", "block_size": 32}
    able = chip(kv_dtypes=("bfloat16", "fp8_e4m3"), mixed_kv=True)
    assert resolve_kv_schema(asked, able, DEFAULT, "bfloat16") == evolve(
        DEFAULT, dtype="fp8_e4m3", block_size=32
    )
    from_config = evolve(DEFAULT, dtype="fp8_e4m3")
    assert resolve_kv_schema({"block_size": 32}, able, from_config, "bfloat16").dtype == "fp8_e4m3"
    assert resolve_kv_schema("auto", able, from_config, "bfloat16").dtype == "bfloat16"


def test_int8_brings_its_scales_and_needs_no_activations_of_its_type():
    wanted = evolve(DEFAULT, dtype="int8", scale_dtype="float32")
    for asked in ("int8", {"dtype": "int8"}, wanted, wanted.to_dict()):
        assert resolve_kv_schema(asked, CPU, DEFAULT, "bfloat16") == wanted
    assert resolve_kv_schema({"block_size": 16}, CPU, wanted, "bfloat16") == wanted
    assert resolve_kv_schema("auto", CPU, wanted, "bfloat16") == DEFAULT


@pytest.mark.parametrize(
    ("asked", "capability", "message"),
    [
        (
            "fp8",
            CPU,
            "kv dtype 'fp8_e4m3' for cpu; accepted: bfloat16, float32, float16, int8 (this backend has no fp8; it has "
            "int8)",
        ),
        (
            "fp8",
            chip(kv_dtypes=("float16", "bfloat16", "int8")),
            "kv dtype 'fp8_e4m3' for chip; accepted: float16, bfloat16, int8 (this backend has no fp8; it has int8)",
        ),
        (
            {"dtype": "int8", "scale_dtype": "fp16"},
            CPU,
            "scale_dtype of the KV cache is 'float16' with dtype 'int8'; accepted: 'float32'",
        ),
        (
            "fp8_e5m2",
            chip(kv_dtypes=("bfloat16", "fp8_e4m3")),
            "kv dtype 'fp8_e5m2' for chip; accepted: bfloat16, fp8_e4m3",
        ),
        (
            "float32",
            CPU,
            "kv dtype 'float32' with activations of dtype 'bfloat16' for cpu; accepted: bfloat16 (its kernels read "
            "no KV of another dtype), or another dtype for both",
        ),
        ({"block_size": 24}, chip(block_sizes=(16, 128)), "block_size is 24 for chip; accepted: 16, 128"),
        ({"num_layers": 3}, CPU, "num_layers of the KV cache is 3; accepted: 2, as the model has it"),
        (evolve(DEFAULT, layout="HND"), CPU, "layout of the KV cache is 'HND'; accepted: 'NHD', as the model has it"),
        ({"block_size": "8"}, CPU, "block_size is '8'; accepted: a whole number of at least 1"),
        ("int3", CPU, f"unknown kv dtype 'int3'; accepted: auto, {', '.join(DTYPE_BYTES)}"),
        ({"dtype": 8}, CPU, f"unknown kv dtype '8'; accepted: auto, {', '.join(DTYPE_BYTES)}"),
        (8, CPU, "KV schema is 8; accepted: a dtype, a mapping of fields or a KVCacheSchema"),
    ],
)  # fmt: skip
def test_a_kv_cache_that_cannot_be(asked, capability, message):
    assert kv_refused(asked, capability) == message


def test_an_unknown_key_of_a_kv_schema_names_the_nearest():
    assert kv_refused({"blocksize": 8}).endswith("did you mean block_size?")
    assert kv_refused({"schema": "AccelConfig"}) == "schema is 'AccelConfig'; accepted: 'KVCacheSchema'"


# The engine and the command line.


def test_an_engine_takes_a_file_a_mapping_or_a_config(text_checkpoint, written):
    file = written(
        f"model: {json.dumps(str(text_checkpoint))}\nblock_size: 8\nmax_sequences: 2\nmax_length: 64"
    )
    engine = SageLLMEngine(config=file, max_sequences=3)
    assert (engine.get_kv_schema().block_size, engine.core.config.max_sequences) == (8, 3)
    same = SageLLMEngine(config=engine.core.config, device="auto", kv_schema={"block_size": 4})
    assert same.get_kv_schema() == evolve(engine.get_kv_schema(), block_size=4)
    assert same.core.config.target == "auto" and same.get_capability().backend == "cpu"
    again = SageLLMEngine(text_checkpoint, config={"max_length": 64}, kv_schema=same.get_kv_schema())
    assert again.get_kv_schema() == same.get_kv_schema()
    outputs = [e.generate(["Once upon a time"])[0].token_ids for e in (engine, same, again)]
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_schema": "fp8"}, "kv dtype 'fp8_e4m3' for cpu; accepted: .*this backend has no fp8.*"),
        ({"kv_dtype": "fp8"}, "kv dtype 'fp8_e4m3' for cpu; accepted: .*this backend has no fp8.*"),
        ({"kv_schema": {"head_dim": 7}}, "head_dim of the KV cache is 7; accepted: .*, as the model has it"),
        ({"dtype": "float32", "kv_schema": "bf16"}, "kv dtype 'bfloat16' with activations of dtype 'float32'.*"),
        ({"device": "cpu", "target": "cpu"}, "device is 'cpu' and target 'cpu'; accepted: one of them"),
        ({"config": {"modle": "x"}}, "unknown setting in config 'modle'; .*did you mean model.*"),
    ],
)  # fmt: skip
def test_an_engine_refuses(text_checkpoint, settings, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        SageLLMEngine(text_checkpoint, **settings)


def test_options_go_before_the_file_and_what_is_not_given_does_not(text_checkpoint, written, tmp_path):
    file = written(f"model: {json.dumps(str(text_checkpoint))}\nmax_length: 1000")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    run = ["compile", "--config", str(file), "--prompts", str(prompts), "--emit", "plan"]
    assert "max_length is 1000; accepted: at most 256" in capture(run).stderr
    assert capture([*run, "--max-length", "64"]).code == 0
    assert "has no fp8" in capture([*run, "--kv-schema", "fp8"]).stderr


def test_a_vendors_backend_is_better_than_the_cpu_where_its_device_is(monkeypatch):
    from sagellm.backends.cpu import CpuBackend

    assert backends.best() == "cpu"
    monkeypatch.setitem(backends.BACKENDS, "other", f"{CpuBackend.__module__}:CpuBackend")
    assert backends.best() == "other"
    monkeypatch.setattr(CpuBackend, "available", False)
    assert backends.best() == "cpu"
