"""The engines that there are, as columns: what each can do, how busy it is, and how fast it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from attrs import define, field

from sagellm.control_plane.features import ROUTES
from sagellm.control_plane.routing.ask import KINDS, Ask
from sagellm.control_plane.routing.learned import Line, Mean
from sagellm.control_plane.routing.prefixes import CHUNK, PrefixTable
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError, unknown

ROW = np.dtype(
    [
        ("live", np.bool_),
        ("accepting", np.bool_),
        ("model", np.int64),
        ("features", np.int64),
        ("max_length", np.int64),
        ("max_concurrent", np.int64),
        ("ranks", np.int64),
        ("hardware", np.int64),
        ("cost", np.float64),
        ("active", np.int64),
        ("ahead", np.int64),
        ("others", np.int64),
        ("running", np.int64),
        ("waiting", np.int64),
        ("kv_use", np.float64),
        ("ttft_known", np.bool_),
        ("ttft_start", np.float64),
        ("ttft_token", np.float64),
        ("tpot_known", np.bool_),
        ("tpot_start", np.float64),
        ("tpot_request", np.float64),
        ("turn", np.int64),
    ]
)
"""model: a number of its name. features: a bit each. hardware: see `hardware_class`. cost: of a token, nan where it has
no price. active: requests sent there and not ended. ahead: their prompt tokens that are still to be computed. others:
requests it has from elsewhere, as of its last report; running, waiting and kv_use are of that too, 0 where it does not
tell. ttft_start, ttft_token: seconds to a first token, and for each prompt token before it. tpot_start, tpot_request:
seconds to a next token, and for each request beside. turn: number of the decision that chose it last."""

UNBOUNDED = np.iinfo(np.int64).max
NOBODY = 1 << 62
"""The bit of features that no engine of the fleet ever had."""
DOMESTIC = frozenset({"ascend", "npu", "mlu", "cambricon", "dcu", "hygon", "xpu", "kunlun"})
NO_ACCELERATOR = frozenset({"cpu", "null"})
HARDWARE = ("sageLLM on a domestic accelerator", "an accelerator", "a device that is not known", "a CPU")
DEFAULT_OUTPUT = 256
"""Tokens that an answer is taken to have before one was seen."""


def hardware_class(kind: str, device: str | None) -> int:
    """Index into HARDWARE; lower is preferred. `device` is a target's name, as in `ascend:910B3` or `dcu+kernels`."""
    name = re.split(r"[:+]", device or "", maxsplit=1)[0].lower()
    if name in DOMESTIC and kind == "sagellm":
        return 0
    if not name or name == "auto":
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
    ttft: Line = field(factory=lambda: Line(flat=False))
    tpot: Line = field(factory=lambda: Line(flat=True))
    flights: dict[str, Flight] = field(factory=dict)


REASONS = (
    "gone",
    "model",
    "kind",
    "features",
    "length",
    "tags",
    "ranks",
    "budget",
    "accepting",
    "tried",
    "full",
)
"""Why an engine does not get a request: rows of `Fleet.refusals`. `gone` rows have no engine."""
GONE, MODEL, KIND, FEATURES, LENGTH, TAGS, RANKS, BUDGET, ACCEPTING, TRIED, FULL = range(len(REASONS))
NEVER = slice(MODEL, ACCEPTING)
"""Reasons that do not pass with time."""


class Fleet:
    """A row for each engine. Rows of engines that left are used again; every update takes the same few operations,
    whatever the number of engines, except that forgetting an engine goes through the chunks it saw."""

    def __init__(self, chunk_tokens: int = CHUNK):
        """`chunk_tokens`: that a chunk of the requests has."""
        self.chunk_tokens = chunk_tokens
        self.prefixes = PrefixTable()
        self.engines: list[Engine | None] = []
        self.models: Counter[str] = Counter()
        self._table = np.zeros(8, ROW)
        self._row: dict[str, int] = {}
        self._spare: list[int] = []
        self._model: dict[str, int] = {}
        self._output: dict[str, Mean] = {}
        self._labelled: dict[tuple[str, str], set[int]] = {}
        self._bits = {feature: 1 << number for number, feature in enumerate(ROUTES.values())}
        self._route = {kind: self._bits[ROUTES[path]] for path, kind in KINDS.items()}
        self._masks: dict[frozenset[str], int] = {}

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, engine_id: object) -> bool:
        return engine_id in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    @property
    def rows(self) -> np.ndarray:
        """ROW [rows], spare ones among them; a view that the next `add` may leave behind."""
        return self._table[: len(self.engines)]

    def row(self, engine_id: str) -> int:
        """Raises UserError for an engine that is not there."""
        try:
            return self._row[engine_id]
        except KeyError:
            raise unknown("engine", engine_id, self._row) from None

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
        if row == len(self.engines):
            self.engines.append(None)
        if row == len(self._table):
            self._table = np.concatenate([self._table, np.zeros(row, ROW)])
        self._row[engine_id] = row
        tags = {name: str(value) for name, value in (labels or {}).items()}
        self.engines[row] = Engine(
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
        values = self._table[row : row + 1]
        values[:] = np.zeros(1, ROW)
        values["live"], values["features"], values["ranks"] = True, bits, ranks
        values["model"] = self._model.setdefault(model_id, len(self._model))
        values["max_length"] = UNBOUNDED if max_length is None else max_length
        values["max_concurrent"] = UNBOUNDED if max_concurrent is None else max_concurrent
        values["hardware"] = hardware_class(kind, device)
        values["cost"] = np.nan if cost_per_token is None else cost_per_token
        for label in tags.items():
            self._labelled.setdefault(label, set()).add(row)
        self.models[model_id] += 1
        self.prefixes.bound(row, None if kv_tokens is None else max(1, kv_tokens // self.chunk_tokens))
        return row

    def remove(self, engine_id: str) -> None:
        """What is reported later of requests it had is left aside."""
        row = self.row(engine_id)
        engine = self._engine(row)
        del self._row[engine_id]
        self.engines[row] = None
        self._table[row] = np.zeros((), ROW)
        self._spare.append(row)
        self.prefixes.forget(row)
        for label in engine.labels.items():
            self._labelled[label].discard(row)
            if not self._labelled[label]:
                del self._labelled[label]
        self.models[engine.model_id] -= 1
        if not self.models[engine.model_id]:
            del self.models[engine.model_id]

    def set_state(self, engine_id: str, accepting: bool) -> None:
        self._table["accepting"][self.row(engine_id)] = accepting

    def set_load(self, engine_id: str, load: EngineLoad) -> None:
        """As it reports now."""
        row = self.row(engine_id)
        values = self._table[row]
        values["running"], values["waiting"] = load.running or 0, load.waiting or 0
        values["kv_use"] = load.kv_use or 0.0
        values["others"] = max(0, (load.running or 0) + (load.waiting or 0) - int(values["active"]))

    def lost_cache(self, engine_id: str) -> None:
        """It was started again: what it saw is not there any more."""
        self.prefixes.forget(self.row(engine_id))

    def _engine(self, row: int) -> Engine:
        engine = self.engines[row]
        assert engine is not None
        return engine

    def _intern(self, features: frozenset[str]) -> int:
        fresh = [feature for feature in sorted(features) if feature not in self._bits]
        if len(self._bits) + len(fresh) > 62:
            raise UserError(f"{len(self._bits) + len(fresh)} different features; accepted: at most 62")
        for feature in fresh:
            self._bits[feature] = 1 << len(self._bits)
        if fresh:
            self._masks.clear()
        return self._mask(features)

    def _mask(self, features: frozenset[str]) -> int:
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
        values = self._table[row]
        ahead, active = int(values["ahead"]), int(values["active"])
        flights[request.request_id] = Flight(computed, ahead, active + 1)
        values["ahead"], values["active"] = ahead + computed, active + 1
        self.prefixes.saw(row, request.chunks)

    def first_token(self, engine_id: str, request: Ask, seconds: float) -> None:
        """It came so many seconds after the request was sent."""
        row = self._row.get(engine_id, -1)
        flight = self._engine(row).flights.get(request.request_id) if row >= 0 else None
        if flight is None or flight.first:
            return
        flight.first = True
        line, values = self._engine(row).ttft, self._table[row]
        line.add(flight.before + flight.computed, seconds)
        values["ahead"] -= flight.computed
        values["ttft_known"], values["ttft_start"], values["ttft_token"] = True, line.start, line.slope

    def finished(
        self, engine_id: str, request: Ask, generated: int, seconds_per_token: float | None = None
    ) -> None:
        """It ended with so many tokens; seconds are of each after the first."""
        ended = self._end(engine_id, request)
        if ended is None:
            return
        row, flight = ended
        engine, values = self._engine(row), self._table[row]
        self._output.setdefault(engine.model_id, Mean()).add(generated)
        if seconds_per_token is not None:
            line = engine.tpot
            line.add((flight.beside + int(values["active"]) + 1) / 2, seconds_per_token)
            values["tpot_known"], values["tpot_start"], values["tpot_request"] = True, line.start, line.slope

    def failed(self, engine_id: str, request: Ask) -> None:
        """It ended without an answer: nothing is learned from it."""
        self._end(engine_id, request)

    def _end(self, engine_id: str, request: Ask) -> tuple[int, Flight] | None:
        row = self._row.get(engine_id, -1)
        flight = self._engine(row).flights.pop(request.request_id, None) if row >= 0 else None
        if flight is None:
            return None
        values = self._table[row]
        values["active"] -= 1
        if not flight.first:
            values["ahead"] -= flight.computed
        return row, flight

    def output_of(self, request: Ask) -> float:
        """Tokens that its answer is expected to have: the mean of its model's, within what it allows."""
        model = request.model or next(iter(self.models), "")
        seen = self._output.get(model)
        expected = seen.value if seen else DEFAULT_OUTPUT
        return expected if request.max_tokens is None else min(expected, request.max_tokens)

    # who can serve it

    def refusals(self, request: Ask, excluded: Iterable[str] = (), *, least: bool = False) -> np.ndarray:
        """bool [REASONS, rows]: why each row cannot have it. With `least` the prompt is as short as it may be."""
        rows = self.rows
        found = np.zeros((len(REASONS), len(rows)), np.bool_)
        np.logical_not(rows["live"], out=found[GONE])
        if request.model is not None:
            np.not_equal(rows["model"], self._model.get(request.model, -1), out=found[MODEL])
        elif len(self.models) > 1:
            found[MODEL] = True
        features = rows["features"]
        np.equal(features & self._route[request.kind], 0, out=found[KIND])
        wanted = self._masks.get(request.features)
        if wanted is None:
            wanted = self._masks[request.features] = self._mask(request.features.difference(ROUTES.values()))
        if wanted:
            np.not_equal(features & wanted, wanted, out=found[FEATURES])
        prompt = (least and request.least_tokens) or request.prompt_tokens
        np.less(rows["max_length"], prompt + (request.max_tokens or 1), out=found[LENGTH])
        for label in request.tags.items():
            having = list(self._labelled.get(label, ()))
            lacking = np.ones(len(rows), np.bool_)
            lacking[having] = False
            found[TAGS] |= lacking
        if request.ranks > 1:
            np.less(rows["ranks"], request.ranks, out=found[RANKS])
        if request.cost_budget is not None:
            tokens = request.prompt_tokens + (request.max_tokens or self.output_of(request))
            np.greater(rows["cost"] * tokens, request.cost_budget, out=found[BUDGET])
        np.logical_not(rows["accepting"], out=found[ACCEPTING])
        for engine_id in excluded:
            if (row := self._row.get(engine_id)) is not None:
                found[TRIED, row] = True
        np.greater_equal(rows["active"], rows["max_concurrent"], out=found[FULL])
        return found
