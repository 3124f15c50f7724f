"""Choosing an engine, and saying why."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
from attrs import define, evolve

from sagellm.control_plane.routing.ask import Ask
from sagellm.control_plane.routing.fleet import (
    ACCEPTING,
    GONE,
    HARDWARE,
    MODEL,
    NEVER,
    REASONS,
    TRIED,
    Engine,
    Fleet,
    Refusals,
)
from sagellm.control_plane.routing.strategies import NO_PARTS, Candidates, Strategy, Weights, strategy
from sagellm.errors import UserError, unknown

PREFERRED = "preferred"
"""In the place of the strategy's name, where the request named its engine."""
STATUS = {"unknown_model": 404, "unable": 400, "not_accepting": 503, "full": 429}


KEPT_CHUNKS = 64
"""Longer prompts would fill the memory with decisions."""


class NoEngine(UserError):
    """No engine gets this request.

    `kind` is `unknown_model` (the fleet has no such model), `unable` (none of its engines ever could, and why),
    `not_accepting` (none does now) or `full` (one that could has as many as it takes: it is worth waiting).
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    @property
    def status(self) -> int:
        """HTTP's."""
        return STATUS[self.kind]


@define(eq=False)
class Decision:
    """Who got a request, and why. Scores and words are made again, from what was seen, when they are read."""

    number: int
    at: float
    """By the router's clock."""
    request: Ask
    strategy: str
    chosen: str | None
    """None: nobody."""
    refusals: Refusals
    engines: Sequence[Engine | None]
    error: str
    by: Strategy
    seen: Candidates | None
    """By the strategy, which makes the same score of it again; None: it was not asked."""

    def candidates(self) -> dict[str, dict[str, float | bool | str]]:
        """Engine -> what its score was made of; the chosen one first, where there is one."""
        able = self.refusals.able.nonzero()[0].tolist()
        parts = NO_PARTS if self.seen is None else self.by.score(self.seen).parts
        found = {self._at(row).engine_id: _parts(parts, row) for row in able}
        return dict(sorted(found.items(), key=lambda item: item[0] != self.chosen))

    def refused(self) -> dict[str, list[str]]:
        """Engine -> why it cannot have the request."""
        reasons = self.refusals.reasons()
        rows = np.flatnonzero(reasons.any(axis=0) & ~reasons[GONE]).tolist()
        return {self._at(row).engine_id: self._reasons(row, reasons[:, row]) for row in rows}

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "at": self.at,
            "request_id": self.request.request_id,
            "model": self.request.model,
            "strategy": self.strategy,
            "chosen": self.chosen,
            "error": self.error,
            "candidates": self.candidates(),
            "refused": self.refused(),
        }

    def explain(self) -> str:
        """A line for the decision, and one for each engine."""
        lines = [
            f"decision {self.number}: {self.request.request_id} to {self.chosen or 'nobody'} by {self.strategy}"
        ]
        for name, parts in self.candidates().items():
            shown = [f"{part} {_shown(value)}" for part, value in parts.items() if value is not False]
            lines.append(f"  {name}: {', '.join(shown) or 'could serve it'}")
        lines += [f"  {name}: refused, {'; '.join(why)}" for name, why in self.refused().items()]
        return "\n".join(lines)

    def _at(self, row: int) -> Engine:
        engine = self.engines[row]
        assert engine is not None
        return engine

    def _reasons(self, row: int, reasons: np.ndarray) -> list[str]:
        engine, request = self._at(row), self.request
        lacking = sorted(request.features - engine.features - {"chat", "completions", "embeddings"})
        asked = f"{request.prompt_tokens} + {request.max_tokens or 1} tokens"
        other = [f"{k}={v}" for k, v in request.tags.items() if engine.labels.get(k) != v]
        words = {
            "model": f"serves {engine.model_id}",
            "kind": f"does not serve {request.kind.value}",
            "features": f"lacks {', '.join(lacking)}",
            "length": f"{asked} are longer than its {engine.max_length}",
            "tags": f"is not {', '.join(other)}",
            "ranks": f"has {engine.ranks} of {request.ranks} ranks",
            "budget": f"costs more than {request.cost_budget}",
            "accepting": "takes no requests now",
            "tried": "was tried",
            "full": f"has {engine.max_concurrent} requests, its most",
        }
        return [words[REASONS[reason]] for reason in np.flatnonzero(reasons).tolist()]


def _parts(parts: Mapping[str, np.ndarray], row: int) -> dict[str, float | bool | str]:
    shown = {name: values[row].item() for name, values in parts.items()}
    if "hardware" in shown:
        shown["hardware"] = HARDWARE[int(shown["hardware"])]
    if shown.get("guessed"):
        shown["guessed"] = "nothing was seen of its kind: taken to be as fast as the fastest"
    return shown


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "yes" if value is True else str(value)


class Router:
    """Chooses engines of a fleet. The same fleet, requests and seed give the same choices."""

    def __init__(
        self,
        fleet: Fleet,
        strategy: str = "composite",
        *,
        seed: int = 0,
        keep: int = 1000,
        weights: Weights | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """`keep` decisions can be read afterwards. Raises UserError for an unknown strategy."""
        self.fleet, self.weights, self.clock = fleet, weights or Weights(), clock
        self.decisions: deque[Decision] = deque(maxlen=keep)
        """The last ones, oldest first; those in which all engines were full are left out, as they are tried again."""
        self.number = 0
        self._random = Random(seed)
        self.change_strategy(strategy)

    def change_strategy(self, name: str) -> None:
        """For the decisions to come."""
        self.strategy = strategy(name, self.weights)

    def choose(self, request: Ask, excluded: Collection[str] = ()) -> Decision:
        """`excluded`: engines that were tried. Raises NoEngine."""
        fleet = self.fleet
        self.number += 1
        refusals = fleet.refusals(request, excluded)
        rows = refusals.able.nonzero()[0]
        if not rows.size:
            refusals = self._shorter(request, excluded, refusals)
            rows = refusals.able.nonzero()[0]
        preferred = request.preferred
        if preferred is not None and preferred in fleet and refusals.able[row := fleet.row(preferred)]:
            name, seen = PREFERRED, None
        else:
            name, seen = self.strategy.name, Candidates(fleet, request, refusals.able)
            row = self._best(rows, self.strategy.score(seen).keys)
        fleet.columns.turn[row] = self.number
        return self._note(request, name, row, refusals, seen)

    def _best(self, rows: np.ndarray, keys: Sequence[np.ndarray]) -> int:
        for key in (*keys, self.fleet.columns.turn):
            if rows.size == 1:
                break
            values = key[rows]
            # minimum.reduce(), and a comparison with anything but an array, take several times as long
            rows = rows[values == values[values.argmin(), ...]]
        return int(rows[0] if rows.size == 1 else self._random.choice(rows))

    def _shorter(self, request: Ask, excluded: Collection[str], refusals: Refusals) -> Refusals:
        """Where its length is only estimated, and too long for every engine, they may find it shorter."""
        if request.least_tokens is not None and refusals.reasons()[NEVER].any(axis=0).all():
            refusals = self.fleet.refusals(request, excluded, least=True)
        if not refusals.able.any():
            raise self._refuse(request, refusals)
        return refusals

    def _note(
        self,
        request: Ask,
        name: str,
        row: int | None,
        refusals: Refusals,
        seen: Candidates | None = None,
        error: str = "",
    ) -> Decision:
        if len(request.chunks) > KEPT_CHUNKS:
            request = evolve(request, chunks=())
            if seen is not None:
                seen.request = request
        engines = self.fleet.engines
        chosen = None if row is None else engines[row]
        decision = Decision(
            self.number,
            self.clock(),
            request,
            name,
            chosen and chosen.engine_id,
            refusals,
            engines,
            error,
            self.strategy,
            seen,
        )
        self.decisions.append(decision)
        return decision

    def _refuse(self, request: Ask, refusals: Refusals) -> NoEngine:
        reasons = refusals.reasons()
        could = ~reasons[NEVER].any(axis=0)
        now = could & ~reasons[ACCEPTING] & ~reasons[TRIED]
        models = self.fleet.models
        if now.any():
            return NoEngine("full", "every engine that could serve it has as many requests as it takes")
        if not models:
            error = NoEngine("not_accepting", "there is no engine; accepted: requests once one is registered")
        elif request.model is not None and request.model not in models:
            error = NoEngine("unknown_model", str(unknown("model", request.model, sorted(models))))
        elif request.model is None and len(models) > 1:
            error = NoEngine("unable", f"the request names no model; accepted: {', '.join(sorted(models))}")
        elif could.any():
            error = NoEngine("not_accepting", "no engine that could serve it takes requests now")
        else:
            error = None
        decision = self._note(request, self.strategy.name, None, refusals, error=str(error or ""))
        if error is None:
            serving = ~reasons[MODEL]
            why = {
                reason
                for name, reasons in decision.refused().items()
                if serving[self.fleet.row(name)]
                for reason in reasons
            }
            decision.error = f"no engine can serve this request: {', or '.join(sorted(why))}"
            error = NoEngine("unable", decision.error)
        return error
