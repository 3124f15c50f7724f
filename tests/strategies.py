"""Hypothesis strategies: small models of every variation, and batches of requests that begin alike."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from sagellm.batch import Batch, Columns, Phase, Request, SamplingParams
from sagellm.ir.dialects import COMM, NN
from sagellm.ir.edit import only_block
from sagellm.ir.timeline import Machine, list_schedule
from sagellm.models.config import ROPE_KINDS, ModelConfig, RopeConfig
from sagellm.passes import pipeline
from sagellm.passes.comm_compute_overlap import begin_early, halve, reorder
from sagellm.passes.driver import Pass, PassContext, Pipeline
from sagellm.rows import aliased_blocks
from sagellm.target import CapabilityDescriptor

MAX_POSITIONS = 64
EXAMPLES = "SAGELLM_EXAMPLES"
"""Environment variable: how many examples a hypothesis test tries. Without it they are few, and always the same."""


def examples(count: int) -> settings:
    """`count` examples, or as many as the environment asks for."""
    return settings(max_examples=int(os.environ.get(EXAMPLES, count)))


def every_kernel() -> PassContext:
    """For passes: a backend with a kernel for every operation and a weight layout for float32."""
    capability = CapabilityDescriptor(
        backend="test",
        device="cpu",
        dtypes=("float32", "bfloat16"),
        kernels=frozenset(op.name for op in (*NN.operations, *COMM.operations)),
        kv_dtypes=("float32", "bfloat16"),
        block_sizes=(16,),
        linear_layouts={"float32": "onednn"},
    )
    return PassContext(capability)


@dataclass(frozen=True)
class OverlapAlways(Pass):
    """What comm-compute-overlap does where it pays, done everywhere."""

    network_first: bool = False

    name = "overlap-always"
    graph = "model"

    def apply(self, graph, context):
        machine = Machine.of(context.costs, context.topology, context.ranks, 1000)
        for function in graph.functions.values():
            block = only_block(function)
            halve(block)
            begin_early(block)
            reorder(block, list_schedule(block, machine, network_first=self.network_first))


def with_passes(text: str, *more: Pass) -> Pipeline:
    """A pipeline, and these passes behind it."""
    return Pipeline([*pipeline(text).passes, *more])


@st.composite
def ropes(draw, head_dim: int, original: int) -> RopeConfig:
    kind = draw(st.sampled_from(ROPE_KINDS))
    options = {} if kind == "default" else {"factor": draw(st.sampled_from([1.0, 2.5, 8.0]))}
    if kind == "yarn":
        options["attention_factor"] = draw(st.sampled_from([None, 1.3]))
        options["truncate"] = draw(st.booleans())
    return RopeConfig(
        kind=kind,
        theta=draw(st.sampled_from([100.0, 1e6])),
        rotary_dim=head_dim,
        original_max_positions=original,
        **options,
    )


def small_model(**fields) -> ModelConfig:
    """Two layers, the second with a window; `fields` change it."""
    small = {
        "name": "small",
        "architecture": "LlamaForCausalLM",
        "vocab_size": 7,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope": RopeConfig(rotary_dim=4, original_max_positions=MAX_POSITIONS),
        "max_positions": MAX_POSITIONS,
        "tie_embeddings": False,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "windows": (None, 3),
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_ids": (),
        "pad_token_id": None,
    }
    return ModelConfig(**{**small, **fields})


@st.composite
def model_configs(draw) -> ModelConfig:
    """1 to 4 layers; MHA, GQA or MQA; any bias, q/k norm, windows in any layers, tied or not, every kind of rope,
    stretched from a context of 8 tokens."""
    head_dim = draw(st.sampled_from([4, 8]))
    kv_heads, queries = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    layers, window = draw(st.integers(1, 4)), st.sampled_from([None, None, 1, 3, 4])
    return small_model(
        vocab_size=draw(st.integers(5, 12)),
        hidden_size=draw(st.sampled_from([4, 8, 12])),
        intermediate_size=draw(st.sampled_from([6, 10])),
        num_layers=layers,
        num_heads=kv_heads * queries,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        rope=draw(ropes(head_dim, original=8)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        windows=tuple(draw(st.lists(window, min_size=layers, max_size=layers))),
    )


@st.composite
def prompts(draw, count: int, vocab_size: int = 5, max_length: int = 12) -> list[list[int]]:
    """Prompts that begin like earlier ones up to any point, identical ones among them."""
    token = st.integers(0, vocab_size - 1)
    made: list[list[int]] = []
    for _ in range(count):
        start = draw(st.sampled_from(made)) if made and draw(st.integers(0, 4)) else []
        start = start[: draw(st.integers(0, len(start)))] if draw(st.booleans()) else start
        room = max_length - len(start)
        made.append(start + draw(st.lists(token, min_size=0 if start else 1, max_size=min(5, room))))
    return made


samplings = st.one_of(
    st.just(SamplingParams()),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 3]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        min_p=st.sampled_from([0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
    ),
)


@st.composite
def batches(draw, vocab_size: int = 5, max_rows: int = 6) -> Batch:
    """Decodes and prefills in any mixture, whole prompts and chunks from any context. No blocks are given out."""
    count = draw(st.integers(1, max_rows))
    columns = Columns(count + 2, MAX_POSITIONS, draw(st.integers(2, 16)))
    contexts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=2))
    rows = draw(st.permutations(range(count + 2)))[:count]
    decode, prefill = [], []
    for row, tokens in zip(rows, draw(prompts(count, vocab_size))):
        columns.fill(row, Request(str(row), tokens, draw(samplings)), seed=draw(st.integers(0, 2**63)))
        columns.prompt[row] -= draw(st.integers(0, min(2, len(tokens) - 1)))
        if draw(st.integers(0, 2)):
            columns.context[row] = context = min(draw(st.sampled_from(contexts)), len(tokens) - 1)
            left = len(tokens) - context
            columns.new[row] = draw(st.one_of(st.just(left), st.integers(1, left)))
            prefill.append(row)
        else:
            columns.context[row], columns.new[row] = len(tokens) - 1, 1
            decode.append(row)
    return Batch(columns, np.array(decode, np.int64), np.array(prefill, np.int64))


class Pool:
    """Hands out blocks in a shuffled order and takes none back. Block 0 is padding."""

    def __init__(self, blocks: int, seed: int):
        self.free = list(np.random.default_rng(seed).permutation(np.arange(1, blocks)))

    def allocate(self, batch: Batch, shared: bool) -> None:
        """What `kv.allocate` says: a row that shares takes over its leader's full blocks."""
        for row in batch.decode:
            self._extend(batch.columns, row, range(0))
        for row in _leaders_first(batch) if shared else batch.prefill:
            low, high = aliased_blocks(batch.columns, np.array([row])) if shared else ([0], [0])
            self._extend(batch.columns, row, range(low[0], high[0]))

    def _extend(self, c: Columns, row: int, aliased: range) -> None:
        for at in range(c.owned[row], -(-(c.context[row] + c.new[row]) // c.block_size)):
            c.blocks[row, at] = c.blocks[c.leader[row], at] if at in aliased else self.free.pop()
            c.owned[row] = at + 1


def _leaders_first(batch: Batch) -> list[int]:
    c, order = batch.columns, []
    while len(order) < len(batch.prefill):
        order += [
            row
            for row in batch.prefill
            if row not in order and (c.shared[row] == 0 or c.leader[row] in order)
        ]
    return order


def speculate(columns: Columns, rows, vocab_size: int, draw) -> None:
    """Give these rows trees of up to six guesses; children of a node differ."""
    for row in rows:
        nodes: list[tuple[int, int]] = []
        for _ in range(draw(st.integers(1, 6))):
            node = draw(st.integers(0, len(nodes))), draw(st.integers(0, vocab_size - 1))
            if node not in nodes:
                nodes.append(node)
        columns.drafted[row] = len(nodes)
        for at, (parent, token) in enumerate(nodes):
            columns.draft_parents[row, at], columns.draft_tokens[row, at] = parent, token


@st.composite
def speculations(draw, vocab_size: int = 5) -> Batch:
    """Decodes, the last ones with guesses."""
    batch = draw(batches(vocab_size))
    c, rows = batch.columns, np.concatenate([batch.decode, batch.prefill])
    c.context[rows], c.new[rows] = c.length[rows] - 1, 1
    c.prompt[rows] = np.minimum(c.prompt[rows], np.maximum(c.length[rows] - 1, 1))
    speculate(c, rows[draw(st.integers(0, len(rows) - 1)) :].tolist(), vocab_size, draw)
    speculating = Batch(c, rows, np.zeros(0, np.int64))
    speculating.facts[Phase.DECODE] = ("drafted",)
    return speculating
