"""How one of the engines that can serve a request is chosen.

A strategy gives keys: arrays over the rows, lower is better; the second counts where the first is equal, and so on.
What is still equal goes to the engine that was chosen longest ago, and before each had a turn, by the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from attrs import field, frozen

from sagellm import checks
from sagellm.control_plane.routing.ask import Ask
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.errors import unknown

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


class Predicted(NamedTuple):
    """What a request would meet at each engine; arrays [rows], seconds."""

    waiting: np.ndarray
    """Until its prompt's turn: the prompts before it, or as long as the queue that the engine reports takes to shrink,
    one request for each that ends."""
    computing: np.ndarray
    """For the tokens of the prompt that are not cached."""
    prompt: np.ndarray
    """From its turn to its first token."""
    output: np.ndarray
    """For the output after that."""


class Candidates:
    """The fleet as one request saw it; arrays [rows], of which those that are `able` count."""

    __slots__ = ("_cached", "_fleet", "able", "now", "output", "request")

    def __init__(self, fleet: Fleet, request: Ask, able: np.ndarray):
        self.now, self.request, self.able = fleet.now, request, able
        self.output = fleet.output_of(request)
        """Tokens that its answer is expected to have."""
        self._fleet = fleet
        self._cached: np.ndarray | None = None

    def cached(self) -> np.ndarray:
        """Prompt tokens that are taken to be in the cache."""
        if self._cached is None:
            fleet, request = self._fleet, self.request
            most = request.prompt_tokens - 1
            self._cached = fleet.prefixes.match(request.chunks, len(self.able), fleet.chunk_tokens, most)
        return self._cached

    def predict(self) -> Predicted:
        now = self.now
        output = now.tpot * np.array(self.output)
        computing = np.array(float(self.request.prompt_tokens)) - self.cached()
        computing *= now.token
        waiting = now.queue * output
        return Predicted(np.maximum(now.queued, waiting), computing, now.start + computing, output)

    def price(self) -> np.ndarray:
        """Of prompt and output; 0 where the engine has no price."""
        return self.now.cost * np.array(self.request.prompt_tokens + self.output)

    def guessed(self) -> Mapping[str, np.ndarray]:
        """A part of the score, where it holds for any."""
        return NO_PARTS if self.now.guessed is None else {"guessed": self.now.guessed}


class Score(NamedTuple):
    keys: tuple[np.ndarray, ...]
    parts: Mapping[str, np.ndarray]
    """What is shown of each candidate."""


class Strategy(Protocol):
    name: ClassVar[str]

    def score(self, seen: Candidates) -> Score:
        """The same for the same candidates: for the decision, and again when somebody wants to know why."""
        ...


class RoundRobin:
    """One after the other."""

    name = "round_robin"

    def score(self, seen: Candidates) -> Score:
        return Score((), NO_PARTS)


class LeastLoaded:
    """The one with the fewest requests, in its cache and before it."""

    name = "least_loaded"

    def score(self, seen: Candidates) -> Score:
        load = seen.now.load
        return Score((load,), {"load": load})


class PrefixAffinity:
    """The one that holds the longest beginning, unless it is much busier than another; else the least busy."""

    name = "prefix_affinity"

    def score(self, seen: Candidates) -> Score:
        load, cached = seen.now.load, seen.cached()
        some = load[seen.able]
        much_busier = load > TIMES * float(some[some.argmin()]) + SLACK
        parts = {"cached_tokens": cached, "load": load, "much_busier": much_busier}
        return Score((much_busier, -cached, load), parts)


class SLO:
    """Of those predicted to keep the deadline and the time between tokens, the cheapest, then the least busy; where
    none is, the soonest."""

    name = "slo"

    def score(self, seen: Candidates) -> Score:
        request, predicted, price = seen.request, seen.predict(), seen.price()
        tpot, load = seen.now.tpot, seen.now.load
        ttft = predicted.waiting + predicted.prompt
        late = np.zeros(len(ttft), np.bool_)
        if request.deadline_ms is not None:
            late |= ttft * 1e3 > request.deadline_ms
        if request.tbt_ms is not None:
            late |= tpot * 1e3 > request.tbt_ms
        parts = {"ttft_s": ttft, "tpot_s": tpot, "late": late, "price": price, "load": load}
        wished = request.deadline_ms is not None or request.tbt_ms is not None
        first = (late, ttft * late) if wished else ()
        return Score((*first, price, load), {**parts, **seen.guessed()})


class HardwareFirst:
    """A sageLLM on a domestic accelerator, then any accelerator, then CPUs; of equals the least busy."""

    name = "hardware_first"

    def score(self, seen: Candidates) -> Score:
        hardware, load = seen.now.hardware, seen.now.load
        return Score((hardware, load), {"hardware": hardware, "load": load})


class Composite:
    """The least predicted cost in seconds: waiting, the prompt that is not cached, the output, the others there that
    are held up, and what hardware and price add."""

    name = "composite"

    def __init__(self, weights: Weights):
        self._others, self._hardware = np.array(weights.others), np.array(weights.hardware)
        self._price = np.array(weights.price)

    def score(self, seen: Candidates) -> Score:
        now, predicted = seen.now, seen.predict()
        held_up = self._others * predicted.computing * now.active
        # a cache that is nearly full puts sequences back: up to the output's time once more
        crowded = now.crowded * predicted.output
        hardware, price = self._hardware * now.hardware, self._price * seen.price()
        cost = predicted.waiting + predicted.prompt
        for more in (predicted.output, held_up, crowded, hardware, price):
            cost += more
        parts = {
            "cost_s": cost,
            "waiting_s": predicted.waiting,
            "prompt_s": predicted.prompt,
            "output_s": predicted.output,
            "others_s": held_up,
            "crowded_s": crowded,
            "hardware_s": hardware,
            "price_s": price,
            "cached_tokens": seen.cached(),
            **seen.guessed(),
        }
        return Score((cost,), parts)


def _plain(kind: Callable[[], Strategy]) -> Callable[[Weights], Strategy]:
    return lambda weights: kind()


STRATEGIES: Mapping[str, Callable[[Weights], Strategy]] = {
    "composite": Composite,
    "round_robin": _plain(RoundRobin),
    "least_loaded": _plain(LeastLoaded),
    "prefix_affinity": _plain(PrefixAffinity),
    "slo": _plain(SLO),
    "hardware_first": _plain(HardwareFirst),
}
"""By name; composite is the default."""


def strategy(name: str, weights: Weights) -> Strategy:
    """Raises UserError for an unknown name."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return STRATEGIES[name](weights)
