"""A step on disk: the graph as text, and its inputs as safetensors beside it. A recorded step runs again anywhere.

The file holds the rows of the batch, renumbered from 0, with their tokens, sampling columns and the KV blocks they
already filled; and, once the step has run, its logits and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sagellm import backends
from sagellm.backends.base import KVCache, require_device
from sagellm.backends.plan import Program
from sagellm.backends.step import emit_step
from sagellm.batch import MOST_DRAFTS, Batch, Columns
from sagellm.compiler import expected_tensors
from sagellm.engine.explain import explain
from sagellm.engine.load import load_weights
from sagellm.engine.planner import Planner
from sagellm.errors import UserError
from sagellm.ir.edit import only_block
from sagellm.ir.graph import IRGraph
from sagellm.models.checkpoint import Checkpoint
from sagellm.models.config import load_config
from sagellm.models.hub import resolve
from sagellm.runtime.executor import Executor, StepOutcome
from sagellm.runtime.kv import KVManager
from sagellm.schemas import KV_SCALES, KVCacheSchema

if TYPE_CHECKING:
    from sagellm.engine.core import EngineCore

SCALARS = (
    "prompt", "length", "context", "owned", "new", "shared", "cohort", "common", "stages", "temperature",
    "top_k", "top_p", "min_p", "repetition", "presence", "frequency",
    "sample", "minimum", "logprobs", "prompt_logprobs", "computed", "drafted",
)  # fmt: skip
RAGGED = ("stops", "bias_tokens", "bias", "allowed", "draft_tokens", "draft_parents")


@frozen
class Replay:
    """A recorded step, run again."""

    outcome: StepOutcome
    recorded_logits: torch.Tensor | None
    recorded_tokens: torch.Tensor | None
    program: Program

    @property
    def difference(self) -> float | None:
        """Largest difference to the recorded logits."""
        if self.recorded_logits is None:
            return None
        if self.recorded_logits.shape != self.outcome.logits.shape:
            return float("inf")
        return float((self.recorded_logits - self.outcome.logits.cpu()).abs().max())


def inputs_path(text: Path) -> Path:
    return text.with_suffix(".safetensors")


def save_inputs(path: Path, planner: Planner, batch: Batch, cache: KVCache | None = None) -> dict:
    """Write a batch's inputs; give what was written, for `save_outcome`."""
    c = planner.columns
    rows = np.concatenate([batch.decode, batch.prefill])
    number = {int(row): i for i, row in enumerate(rows)}
    longest, entries = int(c.length[rows].max()), int(c.owned[rows].max())
    held = np.unique(np.concatenate([c.blocks[r, : c.owned[r]] for r in rows]))
    table = np.searchsorted(held, c.blocks[rows, :entries])
    tensors = {name: torch.from_numpy(getattr(c, name)[rows].copy()) for name in (*SCALARS, *RAGGED)}
    tensors |= {
        "tokens": torch.from_numpy(c.tokens[rows, :longest].copy()),
        "blocks": torch.from_numpy(table.astype(np.int32)),
        "seed": torch.from_numpy(c.seed[rows].astype(np.int64)),
        "leader": torch.tensor([number.get(int(leader), -1) for leader in c.leader[rows]], dtype=torch.int32),
        "decode": torch.arange(len(batch.decode)),
        "prefill": torch.arange(len(batch.decode), len(rows)),
        "held": torch.tensor(len(held)),
    }
    if cache is not None and len(held):
        tensors["kv"] = cache.read(held)
    save_file(tensors, path, metadata=_metadata(planner))
    return tensors


def save_outcome(path: Path, planner: Planner, inputs: dict, outcome: StepOutcome) -> None:
    outputs = {
        "out.logits": outcome.logits.cpu().clone(),
        "out.tokens": torch.from_numpy(outcome.tokens.copy()),
    }
    save_file(inputs | outputs, path, metadata=_metadata(planner))


def begin_recording(core: EngineCore, batch: Batch) -> Callable[[StepOutcome], None]:
    """Write a step's graph and inputs; the function given back adds the result. A crash leaves what was written."""
    folder = core.config.record
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{core.counters.steps:05}.mlir"
        path.write_text(explain(core, batch, core.config.verify).final.text(), encoding="utf-8")
        inputs = save_inputs(inputs_path(path), core, batch, core.cache)
    except OSError as error:
        raise UserError(f"cannot record to {str(folder)!r}: {error}") from error
    return lambda outcome: save_outcome(inputs_path(path), core, inputs, outcome)


def _metadata(planner: Planner) -> dict[str, str]:
    known = planner.config.model
    return {
        "model": str(planner.folder.resolve()) if Path(known).is_dir() else known,
        "dtype": planner.dtype,
        "target": planner.backend.target,
        "block_size": str(planner.kv_schema.block_size),
    }


def replay(path: Path, target: str | None = None, model: str | None = None) -> Replay:
    """Run a recorded step: read its text, compile it as it stands, load weights by its own program, execute."""
    graph = IRGraph.read(path)
    graph.verify("full")
    if graph.step is None or not graph.functions or not graph.loads:
        raise UserError(
            f"{path.name} lacks a step, a model graph or a weights program; accepted: a whole final dump"
        )
    tensors, meta = _read_inputs(inputs_path(path))
    backend = backends.load(target or meta["target"])
    require_device(backend)
    folder = resolve(model or meta["model"])
    config = load_config(folder, model or meta["model"])
    functions = IRGraph()
    for op in graph:
        if op is not graph.step:
            functions.add(op.clone())
    if functions.ranks > 1:
        raise UserError(f"{path.name} is for {functions.ranks} ranks; accepted: a step of one rank")
    program = backend.emit(functions, f"replay of {path.name}")
    weights = load_weights(
        program, Checkpoint(folder), expected_tensors(functions), device=backend.capability.device
    )
    columns, batch = _columns(tensors, int(meta["block_size"]))
    kept = functions.kv_dtype or meta["dtype"]
    schema = KVCacheSchema(
        dtype=kept,
        scale_dtype=KV_SCALES.get(kept),
        block_size=columns.block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    held = int(tensors["held"])
    kv = KVManager(columns, held + columns.capacity * columns.max_blocks + 1)
    blocks = kv.pool.take(held)
    cache = backend.make_cache(schema, len(kv.pool.references))
    if "kv" in tensors:
        cache.write(blocks, tensors["kv"])
    if held:
        entries = tensors["blocks"].shape[1]
        columns.blocks[:, :entries] = blocks[tensors["blocks"].numpy()]
    executor = Executor(backend, columns, kv, cache, weights, lambda name, words: program[name])
    outcome = executor.run(emit_step(only_block(graph.step)), batch)
    return Replay(outcome, tensors.get("out.logits"), tensors.get("out.tokens"), program)


def _columns(tensors: dict, block_size: int) -> tuple[Columns, Batch]:
    count, longest = tensors["tokens"].shape
    columns = Columns(count, longest + 1 + MOST_DRAFTS, block_size)
    columns.tokens[:, :longest] = tensors["tokens"].numpy()
    for name in (*SCALARS, "leader"):
        getattr(columns, name)[:] = tensors[name].numpy()
    for name in RAGGED:
        setattr(columns, name, tensors[name].numpy())
    columns.seed[:] = tensors["seed"].numpy().astype(np.uint64)
    return columns, Batch(columns, tensors["decode"].numpy(), tensors["prefill"].numpy())


def _read_inputs(path: Path) -> tuple[dict, dict]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    except FileNotFoundError as error:
        raise UserError(f"no inputs beside the text: {path.name} is missing") from error
    except SafetensorError as error:
        raise UserError(f"{path.name} is no valid safetensors file: {error}") from error
