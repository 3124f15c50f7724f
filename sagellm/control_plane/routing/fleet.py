"""The engines that there are, as columns: what each can do, how busy it is, and how fast it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from attrs import define, field, frozen

from sagellm.control_plane.features import ROUTES
from sagellm.control_plane.routing.ask import KINDS, Ask
from sagellm.control_plane.routing.columns import Columns, Outlook, outlook
from sagellm.control_plane.routing.learned import PRIOR, Mean, Speeds
from sagellm.control_plane.routing.prefixes import CHUNK, PrefixTable
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError, unknown

KV_FULL = 0.9
"""Part of the KV cache from which on sequences are soon put back."""
MOST_FEATURES = 62
NOBODY = 1 << MOST_FEATURES
"""The bit of features that no engine of the fleet ever had."""
DOMESTIC = frozenset({"ascend", "npu", "mlu", "cambricon", "dcu", "hygon", "xpu", "kunlun"})
NO_ACCELERATOR = frozenset({"cpu", "null"})
NOT_KNOWN = frozenset({"", "auto", "unknown"})
HARDWARE = ("sageLLM on a domestic accelerator", "an accelerator", "a device that is not known", "a CPU")
DEFAULT_OUTPUT = 256.0
"""Tokens that an answer is taken to have before one was seen."""


def hardware_class(kind: str, device: str | None) -> int:
    """Index into HARDWARE; lower is preferred. `device` is a target's name, as in `ascend:910B3` or `dcu+kernels`."""
    name = re.split(r"[:+]", device or "", maxsplit=1)[0].lower()
    if name in DOMESTIC and kind == "sagellm":
        return 0
    if name in NOT_KNOWN:
        return 2
    return 3 if name in NO_ACCELERATOR else 1


@define(eq=False)
class Flight:
    """A request on its way."""

    computed: int
    """Prompt tokens that are taken not to be in the engine's cache."""
    before: int
    """Prompt tokens that were to be computed there when it was sent."""
    beside: int
    """Requests there when it was sent, itself among them."""
    first: bool = False
    """Its first token came."""


@define(eq=False)
class Engine:
    """What does not change of an engine while it is in the fleet, and what its row's figures are learned from."""

    engine_id: str
    kind: str
    model_id: str
    device: str | None
    features: frozenset[str]
    max_length: int | None
    max_concurrent: int | None
    cost_per_token: float | None
    labels: Mapping[str, str]
    ranks: int
    ttft: Mean = field(factory=lambda: Mean(1.0, PRIOR))
    tpot: Mean = field(factory=lambda: Mean(1.0, PRIOR))
    flights: dict[str, Flight] = field(factory=dict)


REASONS = (
    "gone",
    "model",
    "kind",
    "features",
    "tags",
    "ranks",
    "accepting",
    "length",
    "budget",
    "tried",
    "full",
)
"""Why an engine does not get a request; `gone` rows have no engine."""
GONE, MODEL, KIND, FEATURES, TAGS, RANKS, ACCEPTING, LENGTH, BUDGET, TRIED, FULL = range(len(REASONS))
NEVER = [GONE, MODEL, KIND, FEATURES, TAGS, RANKS, LENGTH, BUDGET]
"""Those that do not pass with time."""
STANDING = 512
"""Kinds of requests whose standing refusals are kept."""


@frozen(eq=False)
class Refusals:
    """Who cannot have a request."""

    able: np.ndarray
    """bool [rows]"""
    standing: np.ndarray
    """bool [REASONS, rows]: what holds as long as the fleet stays as it is; shared, not to be written."""
    passed: Mapping[int, np.ndarray]
    """Reason -> bool [rows]: who passed the tests of this moment."""

    def reasons(self) -> np.ndarray:
        """bool [REASONS, rows]"""
        found = self.standing.copy()
        for reason, passed in self.passed.items():
            found[reason] = ~passed & ~found[GONE]
        return found


class Fleet:
    """A row for each engine. Rows of engines that left are used again; every update takes the same few operations,
    whatever the number of engines, except that forgetting an engine goes through the chunks it saw."""

    def __init__(self, chunk_tokens: int = CHUNK):
        """`chunk_tokens`: that a chunk of the requests has."""
        self.chunk_tokens = chunk_tokens
        self.prefixes = PrefixTable()
        self.engines: tuple[Engine | None, ...] = ()
        """By row."""
        self.models: Counter[str] = Counter()
        self.columns = Columns()
        self.speeds = Speeds()
        self._row: dict[str, int] = {}
        self._spare: list[int] = []
        self._model: dict[str, int] = {}
        self._output: dict[str, Mean] = {}
        self._labelled: dict[tuple[str, str], set[int]] = {}
        self._bits = {feature: 1 << number for number, feature in enumerate(ROUTES.values())}
        self._route = {kind: self._bits[ROUTES[path]] for path, kind in KINDS.items()}
        self._standing: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
        self._now: Outlook | None = None
        """None: something happened since it was made."""

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, engine_id: object) -> bool:
        return engine_id in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def row(self, engine_id: str) -> int:
        """Raises UserError for an engine that is not there."""
        try:
            return self._row[engine_id]
        except KeyError:
            raise unknown("engine", engine_id, self._row) from None

    @property
    def now(self) -> Outlook:
        """Made again when something has happened since."""
        if self._now is None:
            self._now = outlook(self.columns, self.speeds)
        return self._now

    # engines come and go

    def add(
        self,
        engine_id: str,
        *,
        model_id: str,
        kind: str = "llm",
        device: str | None = None,
        features: frozenset[str] = frozenset({"chat", "completions"}),
        max_length: int | None = None,
        max_concurrent: int | None = None,
        cost_per_token: float | None = None,
        labels: Mapping[str, Any] | None = None,
        ranks: int = 1,
        kv_tokens: int | None = None,
    ) -> int:
        """The row of an engine that takes nothing yet. `max_length`: tokens of prompt and output. `max_concurrent`:
        requests that are sent there at once. `kv_tokens`: that its cache holds. None: no limit, or not known."""
        if engine_id in self._row:
            raise UserError(f"engine id {engine_id!r} is in use; accepted: a new one")
        if kind == "embedding":
            features = features - {"chat", "completions"} | {"embeddings"}
        bits = self._intern(features)
        row = self._spare.pop() if self._spare else len(self.engines)
        if row == len(self.columns):
            self.columns.double()
        self._row[engine_id] = row
        tags = {name: str(value) for name, value in (labels or {}).items()}
        engine = Engine(
            engine_id,
            kind,
            model_id,
            device,
            features,
            max_length,
            max_concurrent,
            cost_per_token,
            tags,
            ranks,
        )
        self.engines = (*self.engines[:row], engine, *self.engines[row + 1 :])
        c = self.columns
        c.live[row], c.features[row], c.ranks[row] = True, bits, ranks
        c.model[row] = self._model.setdefault(model_id, len(self._model))
        c.max_length[row] = np.inf if max_length is None else max_length
        c.max_concurrent[row] = np.inf if max_concurrent is None else max_concurrent
        c.hardware[row] = hardware_class(kind, device)
        c.cost[row] = cost_per_token or 0.0
        c.kind[row] = self.speeds.kind((model_id, kind, device, ranks))
        c.ttft_factor[row] = c.tpot_factor[row] = 1.0
        for label in tags.items():
            self._labelled.setdefault(label, set()).add(row)
        self.models[model_id] += 1
        self._standing.clear()
        self._now = None
        self.prefixes.bound(row, None if kv_tokens is None else max(1, kv_tokens // self.chunk_tokens))
        return row

    def remove(self, engine_id: str) -> None:
        """What is reported later of requests it had is left aside."""
        row = self.row(engine_id)
        engine = self._engine(row)
        del self._row[engine_id]
        self.engines = (*self.engines[:row], None, *self.engines[row + 1 :])
        self.columns.clear(row)
        self._spare.append(row)
        self._standing.clear()
        self._now = None
        self.prefixes.forget(row)
        for label in engine.labels.items():
            self._labelled[label].discard(row)
            if not self._labelled[label]:
                del self._labelled[label]
        self.models[engine.model_id] -= 1
        if not self.models[engine.model_id]:
            del self.models[engine.model_id]

    def set_state(self, engine_id: str, accepting: bool) -> None:
        row = self.row(engine_id)
        if self.columns.accepting[row] != accepting:
            self.columns.accepting[row] = accepting
            self._standing.clear()

    def set_load(self, engine_id: str, load: EngineLoad) -> None:
        """As it reports now."""
        row, c = self.row(engine_id), self.columns
        running, waiting, used = load.running or 0, load.waiting or 0, load.kv_use or 0.0
        c.others[row] = max(0, running + waiting - c.active[row])
        c.queue[row] = waiting / max(1, running)
        c.kv_use[row] = used
        c.crowded[row] = min(1.0, max(0.0, (used - KV_FULL) / (1 - KV_FULL)))
        self._now = None

    def lost_cache(self, engine_id: str) -> None:
        """It was started again: what it saw is not there any more."""
        self.prefixes.forget(self.row(engine_id))

    def _engine(self, row: int) -> Engine:
        engine = self.engines[row]
        assert engine is not None
        return engine

    def _intern(self, features: frozenset[str]) -> int:
        fresh = [feature for feature in sorted(features) if feature not in self._bits]
        if len(self._bits) + len(fresh) > MOST_FEATURES:
            raise UserError(
                f"{len(self._bits) + len(fresh)} different features; accepted: at most {MOST_FEATURES}"
            )
        for feature in fresh:
            self._bits[feature] = 1 << len(self._bits)
        return self._mask(features)

    def _mask(self, features: Iterable[str]) -> int:
        mask = 0
        for feature in features:
            mask |= self._bits.get(feature, NOBODY)
        return mask

    # the life of a request

    def sent(self, engine_id: str, request: Ask) -> None:
        """It is on its way; from now on its prompt counts as seen there."""
        row = self.row(engine_id)
        flights = self._engine(row).flights
        if request.request_id in flights:
            raise UserError(f"request {request.request_id!r} is at {engine_id!r} already; accepted: once")
        known = self.prefixes.depth(row, request.chunks) * self.chunk_tokens
        computed = max(1, request.prompt_tokens - known)
        c = self.columns
        flights[request.request_id] = Flight(computed, int(c.ahead[row]), int(c.active[row]) + 1)
        c.ahead[row] += computed
        c.active[row] += 1
        self._now = None
        self.prefixes.saw(row, request.chunks)

    def first_token(self, engine_id: str, request: Ask, seconds: float) -> None:
        """It came so many seconds after the request was sent."""
        row = self._row.get(engine_id, -1)
        flight = self._engine(row).flights.get(request.request_id) if row >= 0 else None
        if flight is None or flight.first:
            return
        flight.first = True
        factor, c = self._engine(row).ttft, self.columns
        c.ahead[row] -= flight.computed
        factor.add(self.speeds.first(int(c.kind[row]), flight.before + flight.computed, seconds))
        c.ttft_factor[row] = factor.value
        self._now = None

    def finished(
        self, engine_id: str, request: Ask, generated: int, seconds_per_token: float | None = None
    ) -> None:
        """It ended with so many tokens; seconds are of each after the first."""
        ended = self._end(engine_id, request)
        if ended is None:
            return
        row, flight = ended
        engine, c = self._engine(row), self.columns
        self._output.setdefault(engine.model_id, Mean()).add(generated)
        if seconds_per_token is not None:
            beside = (flight.beside + c.active[row] + 1) / 2
            engine.tpot.add(self.speeds.each(int(c.kind[row]), beside, seconds_per_token))
            c.tpot_factor[row] = engine.tpot.value
            self._now = None

    def failed(self, engine_id: str, request: Ask) -> None:
        """It ended without an answer: nothing is learned from it."""
        self._end(engine_id, request)

    def _end(self, engine_id: str, request: Ask) -> tuple[int, Flight] | None:
        row = self._row.get(engine_id, -1)
        flight = self._engine(row).flights.pop(request.request_id, None) if row >= 0 else None
        if flight is None:
            return None
        self.columns.active[row] -= 1
        if not flight.first:
            self.columns.ahead[row] -= flight.computed
        self._now = None
        return row, flight

    def output_of(self, request: Ask) -> float:
        """Tokens that its answer is expected to have: the mean of its model's, within what it allows."""
        model = request.model or next(iter(self.models), "")
        seen = self._output.get(model)
        expected = seen.value if seen else DEFAULT_OUTPUT
        return expected if request.max_tokens is None else min(expected, float(request.max_tokens))

    # who can serve it

    def refusals(self, request: Ask, excluded: Collection[str] = (), *, least: bool = False) -> Refusals:
        """With `least` the prompt is taken to be as short as it may be."""
        tags = tuple(request.tags.items()) if request.tags else ()
        kind = (request.model, request.kind.value, request.features, request.ranks, tags)
        standing = self._standing.get(kind)
        if standing is None:
            if len(self._standing) >= STANDING:
                self._standing.clear()
            standing = self._standing[kind] = self._stand(request)
        refused, able = standing
        c = self.columns
        prompt = (least and request.least_tokens) or request.prompt_tokens
        fits = c.max_length >= float(prompt + (request.max_tokens or 1))
        free = self.now.free
        able = able & fits & free
        passed = {LENGTH: fits, FULL: free}
        if request.cost_budget is not None:
            tokens = request.prompt_tokens + (request.max_tokens or self.output_of(request))
            passed[BUDGET] = c.cost * tokens <= request.cost_budget
            able &= passed[BUDGET]
        if excluded:
            passed[TRIED] = fresh = np.ones(len(c), np.bool_)
            fresh[[self._row[each] for each in excluded if each in self._row]] = False
            able &= fresh
        return Refusals(able, refused, passed)

    def _stand(self, request: Ask) -> tuple[np.ndarray, np.ndarray]:
        """bool [REASONS, rows], and [rows] who passes all of these."""
        c = self.columns
        found = np.zeros((len(REASONS), len(c)), np.bool_)
        if request.model is not None:
            found[MODEL] = c.model != self._model.get(request.model, -1)
        else:
            found[MODEL] = len(self.models) > 1
        wanted = self._mask(request.features.difference(ROUTES.values()))
        found[KIND] = c.features & self._route[request.kind] == 0
        found[FEATURES] = c.features & wanted != wanted
        for label in request.tags.items():
            lacking = np.ones(len(c), np.bool_)
            lacking[list(self._labelled.get(label, ()))] = False
            found[TAGS] |= lacking
        found[RANKS] = c.ranks < request.ranks
        found[ACCEPTING] = ~c.accepting
        found &= c.live
        found[GONE] = ~c.live
        return found, ~found.any(axis=0)
