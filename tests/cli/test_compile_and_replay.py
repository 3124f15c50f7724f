"""What a person sees of a batch, and that the dump is the program."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sagellm.cli import capture
from sagellm.engine.record import _columns, _read_inputs, inputs_path, replay
from sagellm.errors import UserError
from sagellm.ir.graph import IRGraph
from sagellm.models.checkpoint import Checkpoint

pytest_plugins = ["checkpoints"]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 12], [40, 6, 7]]
UNIQUE_TOKENS = 7 + 1 + 3


@pytest.fixture(scope="module")
def model(checkpoint):
    return str(checkpoint("Qwen3ForCausalLM"))


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    file = tmp_path_factory.mktemp("requests") / "requests.json"
    file.write_text(json.dumps([{"prompt": p, "max_tokens": 4} for p in PROMPTS]))
    return str(file)


def compile_(model, requests, *more):
    done = capture(["compile", "-m", model, "--requests", requests, *more])
    assert done.code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """Steps of a small batch, recorded while it ran: a prefill with sharing, then decodes."""
    from sagellm.batch import Request, SamplingParams
    from sagellm.config import EngineConfig
    from sagellm.engine.core import EngineCore

    folder = tmp_path_factory.mktemp("steps")
    core = EngineCore(EngineConfig(model=model, record=folder))
    for i, prompt in enumerate(PROMPTS):
        core.submit(Request(str(i), prompt, SamplingParams(max_tokens=3, temperature=0.9 * (i == 1), seed=i)))
    while core.busy:
        core.step()
    return sorted(folder.glob("*.mlir"))


def test_the_dump_after_every_pass_shows_the_shared_beginning(model, requests):
    text = compile_(model, requests, "--dump-ir=after-all")
    before, after = text.split("// -----\n")[:2]
    assert "batch.share" not in before and "batch.share" in after
    for part in text.split("// -----\n"):
        module = part.split("\n", 1)[1]
        assert IRGraph.parse(module).text() == module


def test_tables_show_each_request_on_its_line(model, requests):
    text = compile_(model, requests, "--tables")
    lines = [line for line in text.splitlines() if "{row = " in line]
    assert len(lines) == 3
    assert "length = 7, context = 0, new = 7" in lines[0] + lines[1] + lines[2]
    assert IRGraph.parse(text).text(tables=True) == text


def test_opt_reads_what_compile_wrote(model, requests, tmp_path):
    compile_(model, requests, "-o", str(tmp_path))
    for file in sorted(tmp_path.glob("*.mlir")):
        done = capture(["opt", str(file)])
        assert done.code == 0 and done.stdout == file.read_text(), file.name


def test_the_written_files_are_numbered_and_named_by_phase(model, requests, tmp_path):
    compile_(model, requests, "-o", str(tmp_path))
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "00-lowered.mlir",
        "01-prefix-dedup.mlir",
        "02-speculative-branching.mlir",
        "03-kv-eviction-placement.mlir",
        "04-model.mlir",
        "05-cleanup.mlir",
        "06-kernel-fusion.mlir",
        "07-pack-weights.mlir",
        "08-final.mlir",
        "08-final.safetensors",
        "09-plan.txt",
        "10-code.py",
        "11-remarks.txt",
    ]
    done = capture(["replay", str(tmp_path / "08-final.mlir"), "--json"])
    assert json.loads(done.stdout)["forwarded"] == UNIQUE_TOKENS


@pytest.mark.parametrize(
    ("pipeline", "forwarded"), [("prefix-dedup", UNIQUE_TOKENS), ("kernel-fusion", sum(map(len, PROMPTS)))]
)
def test_without_prefix_dedup_all_tokens_are_forwarded(model, requests, tmp_path, pipeline, forwarded):
    compile_(model, requests, "-p", pipeline, "-o", str(tmp_path))
    final = next(tmp_path.glob("*-final.mlir"))
    assert json.loads(capture(["replay", str(final), "--json"]).stdout)["forwarded"] == forwarded


def test_a_recorded_step_gives_the_same_logits_again(recorded):
    assert len(recorded) == 3
    for file in recorded:
        again = replay(file)
        assert again.difference == 0.0
        assert again.recorded_tokens.tolist() == again.outcome.tokens.tolist()


def test_a_step_for_a_device_that_is_not_here_is_refused_in_one_line_and_runs_on_another(
    model, requests, tmp_path
):
    compile_(model, requests, "--target", "ascend:310P", "--dtype", "float16", "-o", str(tmp_path))
    final = str(next(tmp_path.glob("*-final.mlir")))
    with pytest.raises(
        UserError, match="device 'ascend': package torch_npu is not installed; install"
    ) as error:
        replay(Path(final))
    assert "\n" not in str(error.value)
    _, meta = _read_inputs(inputs_path(Path(final)))
    assert meta["target"] == "ascend:310P"
    assert replay(Path(final), "cpu").outcome.forwarded == UNIQUE_TOKENS


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("nn.rms_norm %x, @first_norm", "nn.rms_norm %x, @first_norm_edited"),
        ("@mlp_norm {eps", "@next_norm {eps"),
        ("nn.rope_kv_write %q, %k, %v", "nn.rope_kv_write %q, %v, %k"),
        ("count = 3", "count = 2"),
    ],
    ids=["other weight", "swapped weights", "swapped operands", "layer left out"],
)
def test_an_edited_dump_gives_other_logits(recorded, tmp_path, find, put):
    source = recorded[0]
    text = source.read_text()
    assert find in text
    text = text.replace(find, put)
    text = text.replace(
        "weights.store %first_norm, @first_norm", "weights.store %first_norm, @first_norm_edited"
    )
    if put.endswith("_edited"):
        text = text.replace("model.layers.0.input_layernorm", "model.layers.1.input_layernorm")
    else:
        text = text.replace("@first_norm_edited", "@first_norm")
    edited = tmp_path / "edited.mlir"
    edited.write_text(text)
    inputs_path(edited).write_bytes(inputs_path(source).read_bytes())
    assert replay(edited).difference > 1e-3


def test_the_emitted_code_alone_gives_the_engines_logits(model, recorded, tmp_path):
    """Code written to disk, imported as a file, with nothing of the compiler: weights, cache and rows go in."""
    from sagellm.backends import load
    from sagellm.config import KVCacheSchema
    from sagellm.models.config import load_config
    from sagellm.rows import build_rows
    from sagellm.runtime.pool import BlockPool

    again = replay(recorded[0])
    file = tmp_path / "emitted.py"
    file.write_text(again.program.source)
    spec = importlib.util.spec_from_file_location("emitted", file)
    emitted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emitted)

    checkpoint = Checkpoint(Path(model))
    weights = emitted.load(lambda name, dtype: checkpoint.read(name).to(dtype))
    tensors, meta = _read_inputs(inputs_path(recorded[0]))
    columns, batch = _columns(tensors, int(meta["block_size"]))
    pool = BlockPool(32)
    pool.extend_shared(columns, batch.prefill)
    config = load_config(Path(model))
    schema = KVCacheSchema(
        dtype="float32",
        block_size=columns.block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    backend = load("cpu")
    rows = backend.upload(build_rows(batch, shared=True), columns.block_size)
    with torch.inference_mode():
        logits = emitted.model(weights, backend.make_cache(schema, 32), rows)
    assert torch.equal(logits, again.recorded_logits)


def test_remarks_and_required_passes(model, requests):
    text = compile_(
        model, requests, "--remarks", "--require-pass", "prefix-dedup", "--require-pass", "kernel-fusion"
    )
    assert (
        "// prefix-dedup: applied at this batch: 4 of 15 prompt tokens are taken over by 1 of 3 prompts"
        in text
    )
    failed = capture(["compile", "-m", model, "--requests", requests, "--require-pass", "cleanup"])
    assert failed.code == 1
    assert failed.stderr.startswith("sagellm compile: error: required pass cleanup did nothing")


def test_verify_checks_every_pass_of_the_pipeline(model, requests):
    last = compile_(model, requests, "--verify", "--emit", "plan").strip().splitlines()[-1]
    assert last.startswith(
        "verified: prefix-dedup, speculative-branching, kv-eviction-placement, cleanup, kernel-fusion, pack-weights"
    )


def test_what_else_can_be_emitted(model, requests):
    assert "def layers_dense(w, kv, x, h, angles, rows):" in compile_(model, requests, "--emit", "code")
    assert "s1 = batch.share(s0)" in compile_(model, requests, "--emit", "plan")
    assert "weights.concat %q_proj, %k_proj, %v_proj" in compile_(model, requests, "--emit", "weights")
    assert compile_(model, requests, "--emit", "dot").startswith("digraph sagellm {")
