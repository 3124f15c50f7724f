"""What needs no weights: model configuration, compiler, columns, pool and scheduler, up to a step's plan.

`EngineCore` adds weights and execution; `sagellm compile` needs only this.
"""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path

import numpy as np
from attrs import evolve

from sagellm import backends, passes, topology
from sagellm.backends.base import Backend
from sagellm.batch import Batch, Columns, Request
from sagellm.compiler import CompiledModel, Compiler, expected_tensors
from sagellm.config import AUTO, AskedKV, EngineConfig, resolve_kv_schema
from sagellm.drafts import Drafts
from sagellm.errors import UserError
from sagellm.host import available_memory
from sagellm.models.config import load_config
from sagellm.models.hub import resolve
from sagellm.models.vocabulary import check_same
from sagellm.passes.driver import StepView
from sagellm.passes.shard import Shard
from sagellm.passes.speculative_branching import SpeculativeBranching
from sagellm.runtime.kv import KVManager
from sagellm.runtime.scheduler import Scheduler
from sagellm.schemas import DTYPE_BYTES, FLOATS, KV_SCALES, KVCacheSchema
from sagellm.target import AttentionShape, StepCost

ACROSS_RANKS = ("shard", "comm-compute-overlap")


class Planner:
    """Stages admit, decide and lower of a step."""

    def __init__(self, config: EngineConfig, kv_schema: AskedKV = None, blocks: int | None = None):
        """`kv_schema` goes before what the config says of the KV cache; `blocks` before what the memory holds."""
        self.config = config
        self.pipeline = passes.pipeline(config.pipeline, config.tensor_parallel)
        self.backend: Backend = backends.load(config.target)
        self.folder: Path = resolve(config.model)
        self.model = load_config(self.folder, config.model)
        self.dtype = self.model.dtype if config.dtype == AUTO else config.dtype
        self.backend.capability.check_dtype(self.dtype)
        kept = self.dtype if config.kv_dtype == AUTO else config.kv_dtype
        default = KVCacheSchema(
            dtype=kept,
            scale_dtype=KV_SCALES.get(kept),
            block_size=config.block_size or self.backend.capability.block_sizes[0],
            num_layers=self.model.num_layers,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
        )
        self.kv_schema = resolve_kv_schema(kv_schema, self.backend.capability, default, self.dtype)
        self.rank_schema = evolve(
            self.kv_schema, num_kv_heads=max(1, self.kv_schema.num_kv_heads // config.tensor_parallel)
        )
        """The part of the KV cache that one rank holds."""
        if (chip := self.backend.silicon) is not None:
            schema = self.kv_schema
            chip.check(self.dtype, schema.head_dim, schema.dtype, schema.block_size)
        self._check_ranks()
        self.compiler = Compiler(
            self.model,
            self.backend,
            self.pipeline,
            self.dtype,
            config.verify,
            config.tensor_parallel,
            self.backend.topology if config.topology == AUTO else topology.find(config.topology),
            None if self.kv_schema.dtype in FLOATS else self.kv_schema.dtype,
        )
        self.expected = expected_tensors(self.rank_program().graph)
        """The checkpoint's tensors that are read, with their shapes."""
        self.columns = Columns(config.max_sequences, self._max_length(), self.kv_schema.block_size)
        if self.model.rope.kind == "dynamic":
            self.columns.alike_up_to = self.model.rope.original_max_positions
        self.kv = KVManager(
            self.columns,
            self._block_count() if blocks is None else blocks,
            identity=f"{config.model} {self.kv_schema}",
            caching=config.prefix_caching and "prefix-dedup" in (p.name for p in self.pipeline.passes),
            host_slots=int(config.host_kv_gib * 2**30 / self.kv_schema.bytes_per_block),
        )
        self.view = StepView(
            costs=self.backend.costs,
            attention=self._attention(),
            step=StepCost.of(self.backend.costs, self.parameters, self.model.num_layers, self.dtype),
            drafts=Drafts(self.columns),
            kv=self.kv,
        )
        self.pipeline.prepare(self.view)
        self.scheduler = Scheduler(
            self.columns,
            self.kv,
            config.max_batched_tokens,
            order=config.order,
            max_queue=config.max_queue,
            end_tokens=tuple(self.model.eos_token_ids),
        )
        self.draft = None if config.draft_model is None else self._plan_drafts(config.draft_model)
        """What the draft model needs, where there is one."""
        self._numbers = count()
        self._seeds = np.random.default_rng(config.seed)

    def _check_ranks(self) -> None:
        """That the pipeline divides the model among the ranks there are."""
        ranks = self.config.tensor_parallel
        asked = [p.ranks or ranks for p in self.pipeline.passes if isinstance(p, Shard)]
        if (ranks > 1 and not asked) or any(others != ranks for others in asked):
            says = f"divides among {asked[0]} ranks" if asked else "has no pass shard"
            raise UserError(
                f"tensor_parallel is {ranks} and the pipeline {says}; accepted: shard, before kernel-fusion"
            )
        if ranks > 1 and self.config.record:
            raise UserError(f"record is set and tensor_parallel is {ranks}; accepted: steps of 1 rank")

    def _plan_drafts(self, name: str) -> Planner:
        """The planner of the draft model, whole on the first rank; UserError where it does not fit the model."""
        passes = self.pipeline.passes
        if not any(isinstance(p, SpeculativeBranching) for p in passes):
            raise UserError(
                f"draft_model is {name!r} and pipeline {str(self.pipeline)!r} lacks {SpeculativeBranching.name}; "
                "accepted: one that has it"
            )
        folder = resolve(name)
        model = load_config(folder, name)
        check_same(self.model, self.folder, model, folder)
        return Planner(
            self.config.changed(
                model=name,
                draft_model=None,
                pipeline=",".join(
                    str(p) for p in passes if p.graph == "model" and p.name not in ACROSS_RANKS
                ),
                max_length=min(self.columns.max_length, model.max_positions),
                tensor_parallel=1,
                prefix_caching=False,
                host_kv_gib=0.0,
                record=None,
            )
        )

    def rank_program(self) -> CompiledModel:
        """A model program, by whose weights program a rank loads, once what it caches is what the KV cache holds."""
        compiled = self.compiler.model(("prefill",))
        cached, heads = compiled.graph.kv_heads, self.rank_schema.num_kv_heads
        if self.config.tensor_parallel > 1 and cached != heads:
            raise UserError(
                f"pipeline {self.pipeline} leaves {cached} KV heads on each rank; accepted: one that leaves {heads}"
            )
        return compiled

    def _attention(self) -> AttentionShape:
        m = self.model
        return AttentionShape(
            heads=m.num_heads,
            kv_heads=m.num_kv_heads,
            head_dim=m.head_dim,
            layers=m.windows.count(None),
            dtype=self.kv_schema.dtype,
        )

    def _max_length(self) -> int:
        asked, limit = self.config.max_length, self.model.max_positions
        if asked is not None and asked > limit:
            raise UserError(f"max_length is {asked}; accepted: at most {limit}, the model's context")
        return asked or limit

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.expected.values())

    def _block_count(self) -> int:
        """Blocks for every sequence at full length, or what the memory share holds, and one of padding.

        The share is of what the weights leave.
        """
        wanted = self.config.max_sequences * self.columns.max_blocks
        weights = int(self.parameters * DTYPE_BYTES[self.dtype])
        each = self.backend.free_memory
        available = available_memory() if each is None else each * self.config.tensor_parallel
        free = available - weights
        if free <= 0:
            raise UserError(
                f"the weights of {self.config.model!r} take {weights >> 20} MiB in {self.dtype}, and "
                f"{available >> 20} MiB of memory are free; accepted: a smaller model or dtype"
            )
        share = int(free * self.config.kv_memory_fraction)
        size = self.rank_schema.bytes_per_block * self.config.tensor_parallel
        blocks = min(wanted, share // size)
        if blocks < 1:
            raise UserError(
                f"kv_memory_fraction {self.config.kv_memory_fraction} of {free >> 20} MiB free memory holds no KV "
                f"block of {size} bytes; accepted: a larger part or a smaller model"
            )
        return blocks + 1

    def submit(self, request: Request, number: int | None = None, *, again: bool = False) -> int:
        """Queue a request; one that can never run is refused at once. Numbers go up; returns the request's."""
        for token in request.prompt:
            if not 0 <= token < self.model.vocab_size:
                raise UserError(f"token id {token} in the prompt; accepted: 0 to {self.model.vocab_size - 1}")
        if request.pooling and self.config.tensor_parallel > 1:
            raise UserError("embeddings with tensor_parallel above 1; accepted: an engine of one rank")
        how = request.sampling
        for name, tokens in (
            ("stop_token_ids", how.stop_token_ids),
            ("logit_bias", [token for token, _ in how.logit_bias]),
        ):
            for token in tokens:
                if token >= self.model.vocab_size:
                    raise UserError(f"{name} has token {token}; accepted: 0 to {self.model.vocab_size - 1}")
        seed = how.seed
        number = next(self._numbers) if number is None else number
        seed = int(self._seeds.integers(2**63)) if seed is None else seed
        self.scheduler.submit(request, number, seed, again=again)
        return number

    def schedule(self) -> Batch:
        """Stages admit and decide: the next step's batch, with what the passes decided about it.

        The first decision is about all candidates; those without room in the token budget or the cache leave.
        """
        batch = self.scheduler.propose()
        self.pipeline.decide(batch, self.view)
        while self.scheduler.fit(batch):
            self.pipeline.decide(batch, self.view)
        self.scheduler.place(batch)
        return batch
