"""How one of the engines that can serve a request is chosen.

A strategy gives keys: arrays over the rows, lower is better; the second counts where the first is equal, and so on.
What is still equal goes to the engine that was chosen longest ago, and before each had a turn, by the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from attrs import field, frozen

from sagellm import checks
from sagellm.control_plane.routing.ask import Ask
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.errors import unknown

TOKENS_PER_REQUEST = 2048
"""Prompt tokens still to be computed that count as one request more."""
SLACK, TIMES = 4, 1.5
"""The engine with the longest beginning is passed over where it has more than 4 requests beyond 1.5 times those of the
least busy one."""
PROMPT_TOKEN, NEXT_TOKEN = 1e-4, 0.02
"""Seconds that are assumed as long as no engine was seen."""
KV_FULL = 0.9
"""Part of the KV cache from which on sequences are soon put back."""
NO_PARTS: Mapping[str, np.ndarray] = {}


@frozen(kw_only=True)
class Weights:
    """What `composite` adds to the predicted seconds."""

    hardware: float = field(default=0.05, validator=checks.number(0))
    """Seconds for each step down the order of `fleet.HARDWARE`."""
    price: float = field(default=100.0, validator=checks.number(0))
    """Seconds for each unit of money that prompt and output cost."""


class Candidates:
    """The fleet as one request sees it; arrays [rows], of which those that are `able` count."""

    def __init__(self, fleet: Fleet, request: Ask, able: np.ndarray):
        self.fleet, self.request, self.able = fleet, request, able
        self.rows = fleet.rows

    @cached_property
    def busy(self) -> np.ndarray:
        """Requests there, from here and from elsewhere."""
        return self.rows["active"] + self.rows["others"]

    @cached_property
    def load(self) -> np.ndarray:
        """Requests; a full KV cache, or prompts still to be computed, count as some more."""
        return self.busy + self.rows["kv_use"] + self.rows["ahead"] / TOKENS_PER_REQUEST

    @cached_property
    def cached(self) -> np.ndarray:
        """Prompt tokens that are taken to be in the cache."""
        depth = self.fleet.prefixes.match(self.request.chunks, len(self.rows))
        return np.minimum(depth * self.fleet.chunk_tokens, self.request.prompt_tokens - 1)

    @cached_property
    def guessed(self) -> np.ndarray:
        """bool: nothing was seen of its speed yet, so it is taken to be as fast as the fastest."""
        return ~(self.rows["ttft_known"] & self.rows["tpot_known"])

    @cached_property
    def prompt_token(self) -> np.ndarray:
        """Seconds for each prompt token."""
        return self._or_fastest("ttft_token", "ttft_known", PROMPT_TOKEN)

    @cached_property
    def tpot(self) -> np.ndarray:
        """Seconds to each next token, with this request there."""
        rows = self.rows
        start = self._or_fastest("tpot_start", "tpot_known", NEXT_TOKEN)
        return start + rows["tpot_request"] * (self.busy + 1)

    def _or_fastest(self, name: str, known: str, default: float) -> np.ndarray:
        seen = self.rows[known]
        fastest = float(np.min(self.rows[name], where=seen & self.able, initial=np.inf))
        return np.where(seen, self.rows[name], default if fastest == np.inf else fastest)

    @cached_property
    def output(self) -> np.ndarray:
        """Seconds for the output after its first token."""
        return self.tpot * self.fleet.output_of(self.request)

    @cached_property
    def waiting(self) -> np.ndarray:
        """Seconds until its prompt's turn: those before it, or as long as the queue that the engine reports takes to
        shrink, one request for each that ends."""
        rows = self.rows
        queue = rows["waiting"] * self.output / np.maximum(rows["running"], 1)
        return np.maximum(rows["ahead"] * self.prompt_token, queue)

    @cached_property
    def prompt(self) -> np.ndarray:
        """Seconds for the tokens of the prompt that are not cached."""
        return self.rows["ttft_start"] + (self.request.prompt_tokens - self.cached) * self.prompt_token

    @cached_property
    def ttft(self) -> np.ndarray:
        return self.waiting + self.prompt

    @cached_property
    def price(self) -> np.ndarray:
        """Of prompt and output; 0 where the engine has no price."""
        cost = np.nan_to_num(self.rows["cost"])
        return cost * (self.request.prompt_tokens + self.fleet.output_of(self.request))


class Score(NamedTuple):
    keys: tuple[np.ndarray, ...]
    parts: Mapping[str, np.ndarray]
    """What is shown of each candidate."""


class Strategy(Protocol):
    name: ClassVar[str]

    def score(self, seen: Candidates) -> Score: ...


class RoundRobin:
    """One after the other."""

    name = "round_robin"

    def score(self, seen: Candidates) -> Score:
        return Score((), NO_PARTS)


class LeastLoaded:
    """The one with the fewest requests, in its cache and before it."""

    name = "least_loaded"

    def score(self, seen: Candidates) -> Score:
        return Score((seen.load,), {"load": seen.load})


class PrefixAffinity:
    """The one that holds the longest beginning, unless it is much busier than another; else the least busy."""

    name = "prefix_affinity"

    def score(self, seen: Candidates) -> Score:
        least = np.min(seen.load, where=seen.able, initial=np.inf)
        much_busier = seen.load > TIMES * least + SLACK
        parts = {"cached_tokens": seen.cached, "load": seen.load, "much_busier": much_busier}
        return Score((much_busier, -seen.cached, seen.load), parts)


class SLO:
    """Of those predicted to keep the deadline and the time between tokens, the cheapest, then the least busy; where
    none is, the soonest."""

    name = "slo"

    def score(self, seen: Candidates) -> Score:
        request = seen.request
        late = np.zeros(len(seen.rows), np.bool_)
        if request.deadline_ms is not None:
            late |= seen.ttft * 1e3 > request.deadline_ms
        if request.tbt_ms is not None:
            late |= seen.tpot * 1e3 > request.tbt_ms
        parts = {
            "ttft_s": seen.ttft,
            "tpot_s": seen.tpot,
            "late": late,
            "price": seen.price,
            "load": seen.load,
        }
        keys = (late, np.where(late, seen.ttft, 0.0), seen.price, seen.load)
        return Score(keys, parts | {"guessed": seen.guessed})


class HardwareFirst:
    """A sageLLM on a domestic accelerator, then any accelerator, then CPUs; of equals the least busy."""

    name = "hardware_first"

    def score(self, seen: Candidates) -> Score:
        hardware = seen.rows["hardware"].copy()
        return Score((hardware, seen.load), {"hardware": hardware, "load": seen.load})


class Composite:
    """The least predicted cost in seconds: waiting, the prompt that is not cached, the output, and what hardware and
    price add."""

    name = "composite"

    def __init__(self, weights: Weights):
        self.weights = weights

    def score(self, seen: Candidates) -> Score:
        rows, weights = seen.rows, self.weights
        # a cache that is nearly full puts sequences back: up to the output's time once more
        crowded = np.clip((rows["kv_use"] - KV_FULL) / (1 - KV_FULL), 0, 1) * seen.output
        hardware, price = weights.hardware * rows["hardware"], weights.price * seen.price
        cost = seen.ttft + seen.output + crowded + hardware + price
        parts = {
            "cost_s": cost,
            "waiting_s": seen.waiting,
            "prompt_s": seen.prompt,
            "output_s": seen.output,
            "crowded_s": crowded,
            "hardware_s": hardware,
            "price_s": price,
            "cached_tokens": seen.cached,
            "guessed": seen.guessed,
        }
        return Score((cost,), parts)


def _without_weights(kind: type[Strategy]):
    return lambda weights: kind()


STRATEGIES = {
    Composite.name: Composite,
    **{
        kind.name: _without_weights(kind)
        for kind in (RoundRobin, LeastLoaded, PrefixAffinity, SLO, HardwareFirst)
    },
}
"""By name; composite is the default."""


def strategy(name: str, weights: Weights) -> Strategy:
    """Raises UserError for an unknown name."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return STRATEGIES[name](weights)
