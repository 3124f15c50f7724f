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
NO_PARTS: Mapping[str, np.ndarray] = {}


@frozen(kw_only=True)
class Weights:
    """What `composite` adds to the predicted seconds."""

    others: float = field(default=1.0, validator=checks.number(0))
    """Seconds for each that one of the requests there is held up while the prompt is computed: at 1 the cost is that of
    all requests together, and what is cached counts for more where much is going on."""
    hardware: float = field(default=0.05, validator=checks.number(0))
    """Seconds for each step down the order of `fleet.HARDWARE`."""
    price: float = field(default=100.0, validator=checks.number(0))
    """Seconds for each unit of money that prompt and output cost."""


class Candidates:
    """The fleet as one request sees it; arrays [rows], of which those that are `able` count."""

    def __init__(self, fleet: Fleet, request: Ask, able: np.ndarray):
        self.fleet, self.request, self.able = fleet, request, able
        self.columns = fleet.columns

    @cached_property
    def load(self) -> np.ndarray:
        """Requests; a full KV cache, or prompts still to be computed, count as some more."""
        c = self.columns
        return c.active + c.others + c.kv_use + c.ahead * (1 / TOKENS_PER_REQUEST)

    @cached_property
    def cached(self) -> np.ndarray:
        """Prompt tokens that are taken to be in the cache."""
        depth = self.fleet.prefixes.match(self.request.chunks, len(self.columns))
        return np.minimum(depth * self.fleet.chunk_tokens, self.request.prompt_tokens - 1)

    @cached_property
    def guessed(self) -> np.ndarray:
        """bool: nothing was seen of engines of its kind, so it is taken to be as fast as the fastest."""
        return ~self.fleet.speeds.known.all(axis=0)[self.columns.kind]

    @cached_property
    def prompt_token(self) -> np.ndarray:
        """Seconds for each prompt token."""
        c = self.columns
        return self.fleet.speeds.token[c.kind] * c.ttft_factor

    @cached_property
    def tpot(self) -> np.ndarray:
        """Seconds to each next token, with this request there."""
        c, speeds = self.columns, self.fleet.speeds
        beside = c.active + c.others + 1
        return (speeds.next[c.kind] + speeds.request[c.kind] * beside) * c.tpot_factor

    @cached_property
    def tokens(self) -> float:
        """That the output is expected to have."""
        return self.fleet.output_of(self.request)

    @cached_property
    def output(self) -> np.ndarray:
        """Seconds for the output after its first token."""
        return self.tpot * self.tokens

    @cached_property
    def waiting(self) -> np.ndarray:
        """Seconds until its prompt's turn: those before it, or as long as the queue that the engine reports takes to
        shrink, one request for each that ends."""
        c = self.columns
        return np.maximum(c.ahead * self.prompt_token, c.queue * self.output)

    @cached_property
    def computing(self) -> np.ndarray:
        """Seconds that the tokens of the prompt take which are not cached."""
        return (self.request.prompt_tokens - self.cached) * self.prompt_token

    @cached_property
    def prompt(self) -> np.ndarray:
        """Seconds from its turn to its first token."""
        return self.fleet.speeds.start[self.columns.kind] * self.columns.ttft_factor + self.computing

    @cached_property
    def ttft(self) -> np.ndarray:
        return self.waiting + self.prompt

    @cached_property
    def price(self) -> np.ndarray:
        """Of prompt and output; 0 where the engine has no price."""
        return self.columns.cost * (self.request.prompt_tokens + self.tokens)


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
        least = np.minimum.reduce(seen.load[seen.able])
        much_busier = seen.load > TIMES * least + SLACK
        parts = {"cached_tokens": seen.cached, "load": seen.load, "much_busier": much_busier}
        return Score((much_busier, -seen.cached, seen.load), parts)


class SLO:
    """Of those predicted to keep the deadline and the time between tokens, the cheapest, then the least busy; where
    none is, the soonest."""

    name = "slo"

    def score(self, seen: Candidates) -> Score:
        request = seen.request
        late = np.zeros(len(seen.able), np.bool_)
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
        if seen.fleet.speeds.unseen:
            parts["guessed"] = seen.guessed
        return Score((late, np.where(late, seen.ttft, 0.0), seen.price, seen.load), parts)


class HardwareFirst:
    """A sageLLM on a domestic accelerator, then any accelerator, then CPUs; of equals the least busy."""

    name = "hardware_first"

    def score(self, seen: Candidates) -> Score:
        hardware = seen.columns.hardware.copy()
        return Score((hardware, seen.load), {"hardware": hardware, "load": seen.load})


class Composite:
    """The least predicted cost in seconds: waiting, the prompt that is not cached, the output, the others there that
    are held up, and what hardware and price add."""

    name = "composite"

    def __init__(self, weights: Weights):
        self.weights = weights

    def score(self, seen: Candidates) -> Score:
        c, weights = seen.columns, self.weights
        # a cache that is nearly full puts sequences back: up to the output's time once more
        crowded = c.crowded * seen.output
        hardware, price = weights.hardware * c.hardware, weights.price * seen.price
        held_up = weights.others * seen.computing * c.active
        cost = seen.waiting + seen.prompt + seen.output + held_up + crowded + hardware + price
        parts = {
            "cost_s": cost,
            "waiting_s": seen.waiting,
            "prompt_s": seen.prompt,
            "output_s": seen.output,
            "others_s": held_up,
            "crowded_s": crowded,
            "hardware_s": hardware,
            "price_s": price,
            "cached_tokens": seen.cached,
        }
        if seen.fleet.speeds.unseen:
            parts["guessed"] = seen.guessed
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
