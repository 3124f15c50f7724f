"""What the scheduler hands over: requests, the columns of the running sequences, one step's batch.

A leaf: numpy only, no xDSL, no torch. A running sequence is a row of `Columns`; everything that a step needs
to know of it is a number in a column, so that no step walks over requests in Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum, IntFlag
from hashlib import sha256
from typing import Any

import numpy as np
from attrs import define, field

from sagellm.errors import UserError, unknown
from sagellm.grammar import Grammar, as_grammar

MOST_DRAFTS = 16
"""Guesses of one sequence in one step."""


POOLINGS = ("", "mean", "last", "cls")
"""How a prompt becomes one vector, by its number in `Columns.pooling`: the mean of its hidden states, the last, the
first. The empty one stands for prompts that are continued."""


class Phase(IntEnum):
    """What a sequence does in a step."""

    DECODE = 0
    PREFILL = 1


def _range(low: float, high: float, *, low_open: bool = False):
    accepted = f"{'more than' if low_open else 'at least'} {low:g}" + (
        f" and at most {high:g}" if math.isfinite(high) else ""
    )

    def check(instance: object, attribute, value: object) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value > high or (value <= low if low_open else value < low):
            raise UserError(f"{attribute.name} is {value!r}; accepted: a number {accepted}")

    return check


def _whole(low: int, high: int | None = None):
    accepted = f"a whole number of at least {low}" + (f" and at most {high}" if high is not None else "")

    def check(instance: object, attribute, value: object) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            raise UserError(f"{attribute.name} is {value!r}; accepted: {accepted}")

    return check


def _seconds(instance: object, attribute, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{attribute.name} is {value!r}; accepted: seconds, more than 0")


def _pooling(instance: object, attribute, value: object) -> None:
    if value not in POOLINGS:
        raise unknown(attribute.name, value, POOLINGS[1:])


def _pairs(value: object) -> object:
    """{token: bias}, as the OpenAI API has it (JSON makes texts of its keys), or pairs."""
    try:
        items = value.items() if isinstance(value, dict) else (value or ())
        return tuple((int(t) if isinstance(t, str) else t, bias) for t, bias in items)
    except (TypeError, ValueError):
        raise UserError(f"logit_bias is {value!r}; accepted: {{token id: bias}}") from None


def _ids(value: object) -> tuple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UserError(f"stop_token_ids is {value!r}; accepted: a list of token ids")
    return tuple(value)


@define(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen. Names and defaults are those of the OpenAI API and of vLLM."""

    max_tokens: int = field(default=128, validator=_whole(1))
    temperature: float = field(default=0.0, validator=_range(0, math.inf))
    """0 is greedy."""
    top_k: int = field(default=0, validator=_whole(0))
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = field(default=1.0, validator=_range(0, 1, low_open=True))
    min_p: float = field(default=0.0, validator=_range(0, 1))
    repetition_penalty: float = field(default=1.0, validator=_range(0, math.inf, low_open=True))
    """Over prompt and output tokens, as in CTRL (Keskar et al. 2019)."""
    presence_penalty: float = field(default=0.0, validator=_range(-2, 2))
    frequency_penalty: float = field(default=0.0, validator=_range(-2, 2))
    seed: int | None = field(default=None)
    """Two runs with one seed draw the same tokens; None takes a fresh seed."""
    stop: tuple[str, ...] = field(
        default=(), converter=lambda s: (s,) if isinstance(s, str) else tuple(s or ())
    )
    stop_token_ids: tuple[int, ...] = field(default=(), converter=_ids)
    ignore_eos: bool = False
    min_tokens: int = field(default=0, validator=_whole(0))
    """End tokens cannot be chosen before this many; stop strings neither end the output before."""
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), converter=_pairs)
    """Added to these tokens' logits, from -100 to 100; given as {token: bias}, kept as pairs."""
    logprobs: int | None = field(default=None)
    """Return the logprob of each chosen token and of this many likeliest ones (0: the chosen alone)."""
    prompt_logprobs: int | None = field(default=None)
    """The same for each token of the prompt but the first; the prompt is then computed whole."""
    n: int = field(default=1, validator=_whole(1, 128))
    """Outputs wanted; they share the prompt's keys and values."""
    grammar: Grammar | None = field(default=None, converter=as_grammar)
    """What each output must look like: `Grammar.json`, `regex`, `choice`, `lark` or `gbnf`, also as {"regex": "a+"}.
    It ends where nothing can follow, whatever `min_tokens` says."""

    @seed.validator
    def _check_seed(self, attribute, value) -> None:
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63
        ):
            raise UserError(f"seed is {value!r}; accepted: a whole number from 0 to 2**63-1, or nothing")

    @stop.validator
    def _check_stop(self, attribute, value) -> None:
        if not all(isinstance(s, str) and s for s in value):
            raise UserError(f"stop is {list(value)!r}; accepted: a list of texts that are not empty")

    @stop_token_ids.validator
    def _check_stop_token_ids(self, attribute, value) -> None:
        for token in value:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise UserError(f"stop_token_ids has {token!r}; accepted: token ids")

    @min_tokens.validator
    def _check_min_tokens(self, attribute, value) -> None:
        _whole(0, self.max_tokens)(self, attribute, value)

    @logit_bias.validator
    def _check_logit_bias(self, attribute, value) -> None:
        for token, bias in value:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise UserError(f"logit_bias has token {token!r}; accepted: token ids")
            if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not -100 <= bias <= 100:
                raise UserError(f"logit_bias of token {token} is {bias!r}; accepted: -100 to 100")

    @logprobs.validator
    @prompt_logprobs.validator
    def _check_logprobs(self, attribute, value) -> None:
        if value is not None:
            _whole(0, 20)(self, attribute, value)

    @grammar.validator
    def _check_grammar(self, attribute, value) -> None:
        if value is not None and not isinstance(value, Grammar):
            raise UserError(
                f"grammar is {value!r}; accepted: a Grammar, a mapping like {{'regex': text}}, or nothing"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@define
class Request:
    """One prompt to be continued."""

    id: str
    prompt: list[int]
    sampling: SamplingParams = field(factory=SamplingParams)
    priority: int = field(default=0, validator=_whole(-(2**31), 2**31 - 1))
    """Lower goes first, where the engine's order is `priority`."""
    deadline: float = field(default=math.inf, validator=_seconds)
    """Seconds from submission within which the first token is wanted; the earliest goes first under `deadline`."""
    salt: str = ""
    """Requests of different salts never share cached blocks: one per tenant keeps them apart."""
    output: list[list[int]] = field(factory=list)
    """Tokens already generated, per sample: a stream that goes on after its core was lost, or elsewhere. None is drawn
    again."""
    ended: tuple[int, ...] = ()
    """Samples that are not wanted any more, as they have ended."""
    pooling: str = field(default="", validator=_pooling)
    """Not to be continued: the prompt's vector is wanted, pooled like this."""

    def brought(self, sample: int) -> list[int]:
        """Tokens of this sample's output that the request came with."""
        return self.output[sample] if sample < len(self.output) else []


class Stage(IntFlag):
    """What a sequence's sampling needs besides the likeliest token."""

    DRAW = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    PENALTIES = 16
    BIAS = 32
    GRAMMAR = 64

    @classmethod
    def of(cls, sampling: SamplingParams) -> Stage:
        stages = cls(0)
        if (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        ):
            stages |= cls.PENALTIES
        if sampling.logit_bias or sampling.min_tokens:
            stages |= cls.BIAS
        if sampling.grammar is not None:
            stages |= cls.GRAMMAR
        if sampling.greedy:
            return stages
        stages |= cls.DRAW
        stages |= cls.TOP_K if sampling.top_k else 0
        stages |= cls.TOP_P if sampling.top_p < 1.0 else 0
        stages |= cls.MIN_P if sampling.min_p > 0.0 else 0
        return stages


class Columns:
    """The running sequences as columns; a sequence is a row number until it ends.

    Shapes: [capacity], `tokens` [capacity, max_length], `blocks` [capacity, max_length / block_size]; `stops` and
    the two of `bias` are as wide as the row that has most, the rest is -1.
    """

    def __init__(self, capacity: int, max_length: int, block_size: int):
        self.capacity, self.max_length, self.block_size = capacity, max_length, block_size
        self.max_blocks = -(-max_length // block_size)
        self.alike_up_to = max_length
        """Keys of longer sequences depend on the length too (dynamic rope): only equally long ones can share."""
        self.tokens = np.zeros((capacity, max_length), np.int32)
        self.blocks = np.zeros((capacity, self.max_blocks), np.int32)
        self.number = np.full(capacity, -1, np.int64)
        """Which request this is: numbers go up with submission, and requests keep theirs."""
        self.sample = np.zeros(capacity, np.int64)
        """Which of a request's `n` samples this is."""
        self.tenant = np.zeros(capacity, np.int64)
        self.priority = np.zeros(capacity, np.int32)
        """A number of the request's salt: sequences of different ones share nothing."""
        self.prompt = np.zeros(capacity, np.int32)
        self.length = np.zeros(capacity, np.int32)
        """Known tokens: the prompt and what was generated."""
        self.limit = np.zeros(capacity, np.int32)
        """The length at which the sequence ends."""
        self.context = np.zeros(capacity, np.int32)
        """Tokens whose keys and values are in the cache."""
        self.computed = np.zeros(capacity, np.int32)
        """The most that `context` was before the sequence was put back: what lies below is computed again."""
        self.owned = np.zeros(capacity, np.int32)
        """Entries of `blocks` in use."""
        self.new = np.zeros(capacity, np.int32)
        """This step: tokens to bring into the cache."""
        self.leader = np.full(capacity, -1, np.int32)
        """This step: the row that computes this row's first `shared` new tokens, or -1."""
        self.shared = np.zeros(capacity, np.int32)
        self.drafted = np.zeros(capacity, np.int32)
        """This step: tokens guessed behind the last known one, to be verified."""
        self.draft_tokens = np.zeros((capacity, MOST_DRAFTS), np.int32)
        self.draft_parents = np.zeros((capacity, MOST_DRAFTS), np.int32)
        """Which guess stands before each, counted from 1; 0 is the last known token."""
        self.cohort = np.full(capacity, -1, np.int32)
        """This step: which decode rows read the first `common` tokens together; a number that they have in common."""
        self.common = np.zeros(capacity, np.int32)
        """This step: tokens of whole blocks that the row reads with its cohort."""
        self.kept: dict[str, Any] = {}
        """What a pass found out and looks at again in the next step, by its name."""
        self.pooling = np.zeros(capacity, np.int8)
        """Which of POOLINGS."""
        self.stages = np.zeros(capacity, np.int32)
        self.temperature = np.zeros(capacity, np.float32)
        self.top_k = np.zeros(capacity, np.int64)
        self.top_p = np.ones(capacity, np.float64)
        self.min_p = np.zeros(capacity, np.float32)
        self.repetition = np.ones(capacity, np.float32)
        self.presence = np.zeros(capacity, np.float32)
        self.frequency = np.zeros(capacity, np.float32)
        self.seed = np.zeros(capacity, np.uint64)
        self.minimum = np.zeros(capacity, np.int32)
        """The length below which no end token may be chosen."""
        self.stops = np.full((capacity, 1), -1, np.int32)
        """Tokens that end the sequence."""
        self.bias_tokens = np.full((capacity, 0), -1, np.int32)
        self.bias = np.zeros((capacity, 0), np.float32)
        self.allowed = np.zeros((capacity, 0), np.int32)
        """Bit t of a row's whole numbers is set where token t may come next; empty until a row has a grammar."""
        self.logprobs = np.full(capacity, -1, np.int32)
        """How many likeliest tokens to report beside the chosen one; -1 reports nothing."""
        self.prompt_logprobs = np.full(capacity, -1, np.int32)
        """The same for the prompt's tokens."""
        self.arrived = np.zeros(capacity)
        """Seconds on the scheduler's clock, as are the next two."""
        self.first_token = np.zeros(capacity)
        self.last_token = np.zeros(capacity)

    def fill(
        self, row: int, request: Request, *, seed: int = 0, number: int = 0, sample: int = 0, end=()
    ) -> None:
        """Put a request into a free row; `end` are the model's end tokens."""
        how = request.sampling
        known = request.prompt + request.brought(sample)
        self.tokens[row, : len(known)] = known
        self.number[row], self.sample[row], self.seed[row] = number, sample, seed
        self.priority[row] = request.priority
        self.tenant[row] = int.from_bytes(sha256(request.salt.encode()).digest()[:8], "big", signed=True)
        self.prompt[row], self.length[row] = len(request.prompt), len(known)
        self.limit[row] = min(len(request.prompt) + how.max_tokens, self.max_length)
        self.minimum[row] = len(request.prompt) + how.min_tokens
        self.context[row] = self.computed[row] = self.owned[row] = self.new[row] = self.shared[row] = 0
        self.drafted[row] = self.common[row] = 0
        self.leader[row] = self.cohort[row] = -1
        self.pooling[row] = POOLINGS.index(request.pooling)
        self.stages[row] = Stage.of(how)
        self.temperature[row] = how.temperature
        self.top_k[row] = how.top_k
        self.top_p[row] = how.top_p
        self.min_p[row] = how.min_p
        self.repetition[row] = how.repetition_penalty
        self.presence[row] = how.presence_penalty
        self.frequency[row] = how.frequency_penalty
        self.logprobs[row] = -1 if how.logprobs is None else how.logprobs
        self.prompt_logprobs[row] = -1 if how.prompt_logprobs is None else how.prompt_logprobs
        ends = (*how.stop_token_ids, *(() if how.ignore_eos else end))
        self.stops = _put(self.stops, row, ends, -1)
        self.bias_tokens = _put(self.bias_tokens, row, [token for token, _ in how.logit_bias], -1)
        self.bias = _put(self.bias, row, [bias for _, bias in how.logit_bias], 0)


def _put(column: np.ndarray, row: int, values, rest: float) -> np.ndarray:
    """Write a row of a ragged column, which grows where it is too narrow."""
    if len(values) > column.shape[1]:
        wider = np.full((len(column), len(values)), rest, column.dtype)
        wider[:, : column.shape[1]] = column
        column = wider
    column[row] = rest
    column[row, : len(values)] = values
    return column


AHEAD = "ahead"
"""When blocks move that the step neither reads nor writes: at any time in it."""


@define
class Moves:
    """Blocks that change their place in a step, in this order; empty again once a step did it."""

    evict: list[int] = field(factory=list)
    """Blocks that leave the device's prefix index."""
    offload: list[tuple[int, int]] = field(factory=list)
    """(block, slot in host memory)."""
    ahead: list[tuple[int, int]] = field(factory=list)
    """(block, slot in host memory), of blocks that stay through this step."""
    fetch: list[tuple[int, int]] = field(factory=list)
    """(slot in host memory, block)."""
    fetch_ahead: list[tuple[int, int]] = field(factory=list)
    """(slot in host memory, block), of a sequence that still waits."""
    copy: list[tuple[int, int]] = field(factory=list)
    """(block, block)."""


class Batch:
    """One step: which rows decode, which prefill.

    What passes decided is in the columns; the structure of it in `facts`, by phase; in words in `notes`, by pass;
    what they could have done and did not in `declines`.
    """

    __slots__ = (
        "ahead", "columns", "coming", "declines", "decode", "facts", "leaving", "moves", "notes", "offload",
        "prefill", "probes", "spare",
    )  # fmt: skip

    def __init__(self, columns: Columns, decode: np.ndarray, prefill: np.ndarray):
        self.columns, self.decode, self.prefill = columns, decode, prefill
        self.facts: dict[Phase, tuple[str, ...]] = {}
        self.notes: dict[str, str] = {}
        self.declines: dict[str, str] = {}
        self.probes: set[str] = set()
        """Passes that decided against what they expect, to learn whether it still holds."""
        self.moves = Moves()
        self.spare = (0, 0)
        """Tokens and KV blocks that guesses may take beside what the rows need."""
        self.leaving = self.ahead = np.zeros(0, np.int64)
        """Idle blocks that make room for this step, and those that may make room for the next, in their order."""
        self.coming = 0
        """Blocks that are fetched for the sequence that waits first."""
        self.offload = False
        """Do blocks that leave go to host memory?"""

    def rows(self, phase: Phase) -> np.ndarray:
        return self.decode if phase is Phase.DECODE else self.prefill

    @property
    def pooling(self) -> str:
        """Of a step of prompts whose vectors are wanted; such prompts are alone in their steps, and whole."""
        return POOLINGS[self.columns.pooling[self.prefill[0]]] if len(self.prefill) else ""

    @property
    def new_tokens(self) -> int:
        """Tokens that this step brings into the cache."""
        c = self.columns
        return len(self.decode) + int(c.drafted[self.decode].sum()) + int(c.new[self.prefill].sum())

    @property
    def forwarded(self) -> int:
        """Tokens that go through the model, as the passes decided."""
        return self.new_tokens - int(self.columns.shared[self.prefill].sum())

    def table(self, phase: Phase) -> dict[str, np.ndarray]:
        """The group's values as a dump shows them."""
        rows, c = self.rows(phase), self.columns
        names = ("length", "context", "new")
        if phase is Phase.PREFILL:
            names += ("leader", "shared")
        else:
            names += ("cohort", "common")
            names += ("drafted",) if self.facts.get(phase) else ()
        return {"row": rows} | {name: getattr(c, name)[rows] for name in names}

    def output_rows(self) -> np.ndarray:
        """Sequences that get a token in this step: all decodes, and prefills that reach their end."""
        c, rows = self.columns, self.prefill
        if not len(rows):
            return self.decode
        return np.concatenate([self.decode, rows[c.context[rows] + c.new[rows] == c.length[rows]]])
