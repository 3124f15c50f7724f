"""How many decisions a core makes: from a request's body to the engine it goes to, with all that is kept of it."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from sagellm.bench.host import calls
from sagellm.control_plane.routing.ask import ask_of
from sagellm.control_plane.routing.decision import Router
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.control_plane.types import RequestMetadata, RequestType
from sagellm.engine.stats import EngineLoad

PATH = "/v1/chat/completions"
MODEL = "model"
AT_ONCE = 10
"""Requests that are on their way together; of so many the time is taken."""
KINDS = (("sagellm", "ascend:910B3"), ("sagellm", "cuda"), ("vllm", "cuda"), ("sagellm", "cpu"))
SYSTEM_PROMPTS, SHARED, OWN = 8, 500, 500
"""Characters of a system prompt, and of what a conversation begins with."""


def fleet(engines: int) -> Fleet:
    """Of one model, on all kinds of hardware, with limits and prices."""
    made = Fleet()
    for number in range(engines):
        kind, device = KINDS[number % len(KINDS)]
        name = f"{kind}-{number}"
        features = frozenset({"chat", "completions", "tools", "grammar", "logprobs"})
        made.add(
            name,
            model_id=MODEL,
            kind=kind,
            device=device,
            features=features,
            max_length=32768,
            max_concurrent=256,
            cost_per_token=1e-7 * (1 + number % 3),
            kv_tokens=2**18,
        )
        made.set_state(name, True)
        made.set_load(name, EngineLoad(running=number % 5, waiting=0, kv_use=number / engines))
    return made


def bodies(requests: int, seed: int) -> list[dict[str, Any]]:
    """Chats of about 1,000 characters; each conversation comes four times."""
    draw = random.Random(seed)

    def words(characters: int) -> str:
        return "".join(draw.choices("etaoin shrdlu", k=characters))

    systems = [words(SHARED) for _ in range(SYSTEM_PROMPTS)]
    talks = [(draw.choice(systems), words(OWN)) for _ in range(-(-requests // 4))]
    return [
        {
            "model": MODEL,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
            "max_tokens": 128,
            "stream": True,
        }
        for system, text in (talks * 4)[:requests]
    ]


def decide(strategy: str, engines: int, requests: int, seed: int = 0) -> dict[str, object]:
    """`choices_per_s`: choosing and keeping the decision. `decisions_per_s`: and reading the body before.
    `requests_per_s`: and the fleet hearing of the request's life. All of one core, by processor time, of the median of
    batches; `best`, the decisions of the best. `calls`: of Python and C functions, in one decision."""
    made = fleet(engines)
    router = Router(made, strategy, seed=seed)
    asked = bodies(requests, seed)
    metas = [
        RequestMetadata(
            request_id=str(number), model_name=MODEL, request_type=RequestType.LLM_CHAT, max_tokens=128
        )
        for number in range(requests)
    ]
    choosing: list[float] = []
    deciding: list[float] = []
    living: list[float] = []
    for at in range(0, requests, AT_ONCE):
        batch = range(at, min(at + AT_ONCE, requests))
        began = time.process_time()
        asks = [ask_of(PATH, asked[number], metas[number]) for number in batch]
        read = time.process_time()
        decisions = [router.choose(ask) for ask in asks]
        chosen = time.process_time()
        for decision in decisions:
            made.sent(decision.chosen or "", decision.request)
        for decision in decisions:
            _live(made, decision.chosen or "", decision.request)
        choosing.append((chosen - read) / len(batch))
        deciding.append((chosen - began) / len(batch))
        living.append((time.process_time() - began) / len(batch))
    return {
        "strategy": strategy,
        "engines": engines,
        "choices_per_s": round(1 / statistics.median(choosing)),
        "decisions_per_s": round(1 / statistics.median(deciding)),
        "best": round(1 / min(deciding)),
        "requests_per_s": round(1 / statistics.median(living)),
        "calls": calls_of(router, asked[-1], metas[-1]),
    }


def _live(made: Fleet, engine: str, request: Any) -> None:
    made.first_token(engine, request, 0.05 + 1e-4 * request.prompt_tokens)
    made.finished(engine, request, 100, 0.02)


def calls_of(router: Router, body: dict[str, Any], meta: RequestMetadata) -> int:
    """Of the second of two equal decisions."""
    router.choose(ask_of(PATH, body, meta))
    return calls(lambda: router.choose(ask_of(PATH, body, meta)))
