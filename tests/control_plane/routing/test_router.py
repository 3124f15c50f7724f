"""Who gets a request, who cannot, and what is said about it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.control_plane import speed
from sagellm.control_plane.routing.ask import Ask, ask_of
from sagellm.control_plane.routing.columns import outlook
from sagellm.control_plane.routing.decision import NoEngine, Router
from sagellm.control_plane.routing.fleet import Fleet, hardware_class
from sagellm.control_plane.routing.strategies import STRATEGIES, Weights
from sagellm.control_plane.types import RequestMetadata, RequestType
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError

CHAT, TEXT, EMBED = (frozenset({name}) for name in ("chat", "completions", "embeddings"))


def fleet_of(**engines) -> Fleet:
    """Each takes requests; facts beside `accepting` go to `add`."""
    fleet = Fleet()
    for name, facts in engines.items():
        accepting = facts.pop("accepting", True)
        fleet.add(name, **{"model_id": "m", **facts})
        fleet.set_state(name, accepting)
    return fleet


def ask(name="r", **facts) -> Ask:
    return Ask(request_id=name, **{"model": "m", **facts})


def choose(fleet, strategy="least_loaded", **facts):
    return Router(fleet, strategy, clock=lambda: 0.0).choose(ask(**facts))


def refused(fleet, excluded=(), **facts) -> NoEngine:
    with pytest.raises(NoEngine) as error:
        Router(fleet, clock=lambda: 0.0).choose(ask(**facts), excluded)
    assert "\n" not in str(error.value)
    return error.value


# any fleet, any request

facts = st.fixed_dictionaries(
    {
        "model_id": st.sampled_from("mn"),
        "kind": st.sampled_from(["sagellm", "vllm", "embedding"]),
        "device": st.sampled_from([None, "cpu", "cuda", "ascend:910B3"]),
        "features": st.frozensets(st.sampled_from(["chat", "completions", "embeddings", "tools", "grammar"])),
        "max_length": st.sampled_from([None, 100, 1000]),
        "max_concurrent": st.sampled_from([None, 1, 2]),
        "cost_per_token": st.sampled_from([None, 0.001, 0.1]),
        "labels": st.dictionaries(st.sampled_from(["zone", "gpu"]), st.sampled_from(["a", "b"])),
        "ranks": st.integers(1, 2),
    }
)
asks = st.builds(
    lambda **given: given,
    model=st.sampled_from(["m", "m", "n", None, "other"]),
    kind=st.sampled_from(list(RequestType)),
    features=st.frozensets(st.sampled_from(["tools", "grammar", "unheard-of"]), max_size=1),
    prompt_tokens=st.sampled_from([1, 90, 500, 5000]),
    max_tokens=st.sampled_from([None, 10, 200]),
    chunks=st.sampled_from([(), (1,), (1, 2), (1, 3), (4, 5, 6)]),
    deadline_ms=st.sampled_from([None, 1.0, 1e4]),
    cost_budget=st.sampled_from([None, 0.5, 50.0]),
    preferred=st.sampled_from([None, "0", "1", "nobody"]),
    tags=st.sampled_from([{}, {"zone": "a"}, {"zone": "a", "gpu": "b"}]),
    ranks=st.integers(1, 2),
)
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9), facts),
        st.tuples(st.just("remove"), st.integers(0, 9), st.none()),
        st.tuples(st.just("state"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("load"), st.integers(0, 9), st.integers(0, 5)),
        st.tuples(st.just("ask"), st.sets(st.integers(0, 9), max_size=2), asks),
        st.tuples(st.just("ask"), st.just(set()), asks),
        st.tuples(st.sampled_from(["first", "finish", "fail"]), st.integers(0, 20), st.floats(0, 5)),
    ),
    max_size=40,
)
ROUTES = {
    RequestType.LLM_CHAT: "chat",
    RequestType.LLM_GENERATE: "completions",
    RequestType.EMBEDDING: "embeddings",
}


class Play:
    """A fleet and a plain model of it, through the same events."""

    def __init__(self, strategy: str, seed: int):
        self.fleet = Fleet()
        self.router = Router(self.fleet, strategy, seed=seed, clock=lambda: 0.0)
        self.known: dict[str, dict] = {}
        self.accepting: dict[str, bool] = {}
        self.sent: list[tuple[str, Ask, int]] = []
        """Engine, request, and which incarnation of the engine."""
        self.born: dict[str, int] = {}
        self.chosen: list[str | None] = []

    def may(self, name: str, request: Ask, excluded) -> bool:
        engine = self.known[name]
        features = engine["features"]
        if engine["kind"] == "embedding":
            features = features - {"chat", "completions"} | {"embeddings"}
        longest = engine["max_length"] or math.inf
        most = engine["max_concurrent"] or math.inf
        tokens = request.prompt_tokens + (request.max_tokens or self.fleet.output_of(request))
        return (
            self.accepting[name]
            and name not in excluded
            and (request.model or engine["model_id"]) == engine["model_id"]
            and (request.model is not None or len({e["model_id"] for e in self.known.values()}) == 1)
            and ROUTES[request.kind] in features
            and request.features <= features
            and request.prompt_tokens + (request.max_tokens or 1) <= longest
            and self.active(name) < most
            and (
                request.cost_budget is None or (engine["cost_per_token"] or 0) * tokens <= request.cost_budget
            )
            and request.tags.items() <= engine["labels"].items()
            and engine["ranks"] >= request.ranks
        )

    def active(self, name: str) -> int:
        return sum(engine == name and born == self.born[name] for engine, _, born in self.sent)

    def step(self, number: int, what: str, who, how) -> None:
        fleet, name = self.fleet, str(who)
        if what == "add" and name not in self.known:
            fleet.add(name, **how)
            self.known[name], self.accepting[name], self.born[name] = how, False, number
        elif what == "remove" and name in self.known:
            fleet.remove(name)
            del self.known[name], self.accepting[name]
        elif what == "state" and name in self.known:
            fleet.set_state(name, how)
            self.accepting[name] = how
        elif what == "load" and name in self.known:
            fleet.set_load(name, EngineLoad(running=how, waiting=how * 2, kv_use=how / 5))
        elif what == "ask":
            self.ask(Ask(request_id=str(number), **how), {str(each) for each in who})
        elif what in ("first", "finish", "fail") and self.sent:
            engine, request, _ = self.sent[who % len(self.sent)]
            if what == "first":
                fleet.first_token(engine, request, how)
                return
            del self.sent[who % len(self.sent)]
            if what == "finish":
                fleet.finished(engine, request, 7, how)
            else:
                fleet.failed(engine, request)

    def ask(self, request: Ask, excluded: set[str]) -> None:
        able = {name for name in self.known if self.may(name, request, excluded)}
        try:
            decision = self.router.choose(request, excluded)
        except NoEngine as error:
            assert not able
            models = {engine["model_id"] for engine in self.known.values()}
            unheard = bool(models) and request.model not in (None, *models)
            assert (error.kind == "unknown_model") == unheard
            self.chosen.append(None)
            return
        assert decision.chosen in able and set(decision.candidates()) == able
        assert set(decision.refused()) == set(self.known) - able and all(decision.refused().values())
        assert request.preferred not in able or decision.chosen == request.preferred
        self.fleet.sent(decision.chosen, request)
        self.sent.append((decision.chosen, request, self.born[decision.chosen]))
        self.chosen.append(decision.chosen)

    def check(self) -> None:
        fleet, c = self.fleet, self.fleet.columns
        assert all(map(np.array_equal, fleet.now, outlook(c, fleet.speeds))), (
            "it is kept between events alone"
        )
        assert set(fleet) == set(self.known) and int(c.live.sum()) == len(fleet) == len(self.known)
        assert (c.active >= 0).all() and (c.ahead >= 0).all()
        for name, facts in self.known.items():
            row = fleet.row(name)
            engine = fleet.engines[row]
            assert engine is not None and engine.engine_id == name and engine.model_id == facts["model_id"]
            assert c.active[row] == self.active(name) and c.ranks[row] == facts["ranks"]
        spare = ~c.live
        assert not c.active[spare].any() and not c.accepting[spare].any()


@examples(60)
@given(happenings, st.sampled_from(list(STRATEGIES)), st.integers(0, 3))
def test_whoever_is_chosen_passes_all_filters_and_rows_stay_right(events, strategy, seed):
    one, two = Play(strategy, seed), Play(strategy, seed)
    for number, (what, who, how) in enumerate(events):
        for play in (one, two):
            play.step(number, what, who, how)
        one.check()
    assert one.chosen == two.chosen


# filters

REFUSALS = [
    ({}, {"model": "m", "features": frozenset({"tools"})}, "lacks tools"),
    ({}, {"kind": RequestType.EMBEDDING}, "does not serve embedding"),
    ({"kind": "embedding"}, {}, "does not serve llm_generate"),
    ({"max_length": 100}, {"prompt_tokens": 90, "max_tokens": 20}, "90 + 20 tokens are longer than its 100"),
    (
        {"cost_per_token": 0.1},
        {"prompt_tokens": 10, "max_tokens": 10, "cost_budget": 1.5},
        "costs more than 1.5",
    ),
    ({"labels": {"zone": "a"}}, {"tags": {"zone": "b"}}, "is not zone=b"),
    ({"ranks": 2}, {"ranks": 4}, "has 2 of 4 ranks"),
]


@pytest.mark.parametrize("engine, request_, reason", REFUSALS)
def test_what_an_engine_cannot_do_is_named(engine, request_, reason):
    fleet = fleet_of(a=engine, other={"model_id": "n"})
    router = Router(fleet, clock=lambda: 0.0)
    with pytest.raises(NoEngine) as error:
        router.choose(ask(**request_))
    assert (error.value.kind, error.value.status) == ("unable", 400)
    assert str(error.value) == f"no engine can serve this request: {reason}"
    (decision,) = router.decisions
    assert decision.chosen is None and decision.refused()["a"] == [reason]
    assert "serves n" in decision.refused()["other"]


def test_a_model_that_no_engine_has_is_told_from_one_that_cannot_be_had_now():
    fleet = fleet_of(a={"accepting": False, "model_id": "m"}, b={"model_id": "n"})
    error = refused(fleet, model="q")
    assert (error.kind, error.status) == ("unknown_model", 404)
    assert str(error) == "unknown model 'q'; accepted: m, n"
    assert (refused(fleet, model="m").kind, refused(fleet, model="m").status) == ("not_accepting", 503)
    assert refused(fleet, model=None).kind == "unable"
    assert refused(Fleet()).kind == "not_accepting"


def test_full_engines_are_worth_waiting_for_and_others_are_not():
    fleet = fleet_of(a={"max_concurrent": 1}, b={"max_concurrent": 1})
    for name in "ab":
        fleet.sent(name, ask(name))
    error = refused(fleet)
    assert (error.kind, error.status) == ("full", 429)
    assert refused(fleet, excluded=("a", "b")).kind == "not_accepting"
    fleet.finished("a", ask("a"), 5)
    assert choose(fleet).chosen == "a"
    assert refused(fleet, excluded=("a",)).kind == "full"


def test_an_estimated_length_refuses_nobody_if_all_would_refuse():
    fleet = fleet_of(short={"max_length": 100}, long={"max_length": 1000})
    assert choose(fleet, prompt_tokens=150, least_tokens=60).chosen == "long"
    assert choose(fleet, prompt_tokens=1500, least_tokens=600).chosen == "long"
    assert refused(fleet, prompt_tokens=2500, least_tokens=1200).kind == "unable"


def test_without_a_model_the_only_one_is_meant():
    assert choose(fleet_of(a={"model_id": "q"}), model=None).chosen == "a"


def test_a_preferred_engine_is_taken_if_it_can_serve_the_request():
    fleet = fleet_of(a={}, b={"max_length": 50})
    fleet.sent("b", ask("busy"))
    decision = choose(fleet, preferred="b")
    assert (decision.chosen, decision.strategy) == ("b", "preferred")
    assert choose(fleet, preferred="b", prompt_tokens=80).chosen == "a"
    assert choose(fleet, preferred="gone").chosen == "a"


# strategies


def test_round_robin_gives_each_a_turn_and_newcomers_too():
    fleet = fleet_of(a={}, b={}, c={})
    router = Router(fleet, "round_robin", seed=3)
    turns = [router.choose(ask()).chosen for _ in range(6)]
    assert sorted(turns[:3]) == ["a", "b", "c"] and turns[3:] == turns[:3]
    fleet.add("d", model_id="m")
    fleet.set_state("d", True)
    assert "d" in [router.choose(ask()).chosen for _ in range(4)]


def test_the_seed_says_who_is_first():
    first = {Router(fleet_of(a={}, b={}, c={}), seed=seed).choose(ask()).chosen for seed in range(20)}
    assert first == {"a", "b", "c"}


def test_least_loaded_counts_requests_of_others_and_prompts_to_come():
    fleet = fleet_of(a={}, b={})
    fleet.set_load("a", EngineLoad(running=3, waiting=0))
    assert choose(fleet).chosen == "b"
    for number in range(2):
        fleet.sent("b", ask(str(number), prompt_tokens=10_000))
    assert choose(fleet).chosen == "a"
    for number in range(2):
        fleet.first_token("b", ask(str(number)), 1.0)
    assert choose(fleet).chosen == "b"


def test_prefix_affinity_follows_the_prompt_until_its_engine_is_much_busier():
    fleet = fleet_of(a={}, b={})
    router = Router(fleet, "prefix_affinity", clock=lambda: 0.0)
    turn = ask("turn", prompt_tokens=200, chunks=(1, 2, 3))
    fleet.sent("a", turn)
    fleet.finished("a", turn, 10)
    went = []
    for number in range(5):
        longer = ask(str(number), prompt_tokens=300, chunks=(1, 2, 3, 10 + number))
        decision = router.choose(longer)
        went.append(decision.chosen)
        fleet.sent(decision.chosen, longer)
    assert went == ["a"] * 4 + ["b"]
    assert decision.candidates()["a"]["cached_tokens"] == 192 and decision.candidates()["a"]["much_busier"]


def test_slo_takes_the_cheapest_that_is_in_time_and_the_soonest_where_none_is():
    fleet = fleet_of(
        fast={"device": "cuda", "cost_per_token": 3e-6},
        cheap={"device": "cpu", "cost_per_token": 1e-6},
    )
    for name, slow in (("fast", 1), ("cheap", 10)):
        for number in range(3):
            seen = ask(str(number), prompt_tokens=100 * (number + 1))
            fleet.sent(name, seen)
            fleet.first_token(name, seen, slow * 1e-4 * seen.prompt_tokens)
            fleet.finished(name, seen, 50, slow * 5e-3)
    wanted = {"prompt_tokens": 1000, "max_tokens": 50}
    assert choose(fleet, "slo", **wanted).chosen == "cheap"
    assert choose(fleet, "slo", **wanted, deadline_ms=500).chosen == "fast"
    assert choose(fleet, "slo", **wanted, tbt_ms=20).chosen == "fast"
    nobody = choose(fleet, "slo", **wanted, deadline_ms=1)
    assert nobody.chosen == "fast" and all(parts["late"] for parts in nobody.candidates().values())
    assert nobody.candidates()["fast"]["ttft_s"] == pytest.approx(0.1, rel=0.1)
    assert nobody.candidates()["cheap"]["ttft_s"] == pytest.approx(1.0, rel=0.1)


def test_hardware_first_prefers_sagellm_on_domestic_accelerators():
    fleet = fleet_of(
        cpu={"kind": "sagellm", "device": "cpu"},
        cuda={"kind": "vllm", "device": "cuda"},
        npu={"kind": "sagellm", "device": "ascend:910B3"},
    )
    decision = choose(fleet, "hardware_first")
    assert decision.chosen == "npu"
    assert decision.candidates()["npu"]["hardware"] == "sageLLM on a domestic accelerator"
    fleet.remove("npu")
    assert choose(fleet, "hardware_first").chosen == "cuda"


@pytest.mark.parametrize(
    "kind, device, expected",
    [
        ("sagellm", "ascend", 0),
        ("sagellm", "mlu", 0),
        ("sagellm", "dcu+kernels", 0),
        ("sagellm", "xpu:P800", 0),
        ("vllm", "ascend", 1),
        ("sagellm", "cuda", 1),
        ("vllm", None, 2),
        ("sagellm", "auto", 2),
        ("llm", "unknown", 2),
        ("sagellm", "cpu", 3),
    ],
)
def test_hardware_by_engine_and_device(kind, device, expected):
    assert hardware_class(kind, device) == expected


def served(fleet, name, request, ttft, tpot):
    fleet.sent(name, request)
    fleet.first_token(name, request, ttft)
    fleet.finished(name, request, 10, tpot)


def test_composite_weighs_the_queue_against_what_is_cached():
    fleet = fleet_of(a={}, b={})
    router = Router(fleet, clock=lambda: 0.0)
    for name in "ab":
        served(fleet, name, ask(f"1{name}", prompt_tokens=1000, chunks=(ord(name),)), 0.1, 0.01)
        served(fleet, name, ask(f"2{name}", prompt_tokens=3000, chunks=(ord(name),)), 0.3, 0.01)
    long = ask(prompt_tokens=6400, max_tokens=10, chunks=tuple(range(100, 200)))
    served(fleet, "a", long, 0.64, 0.01)
    again = router.choose(long)
    assert again.chosen == "a"
    parts = again.candidates()
    assert parts["a"]["cached_tokens"] == 6399 and parts["b"]["cached_tokens"] == 0
    assert parts["b"]["prompt_s"] == pytest.approx(0.64, rel=0.05)
    assert parts["b"]["output_s"] == pytest.approx(0.1, rel=0.05)
    fleet.sent("a", ask("ahead", prompt_tokens=9000))
    assert router.choose(long).chosen == "b"


def test_composite_weighs_price_and_hardware_as_told():
    facts = {
        "dear": {"device": "cuda", "cost_per_token": 1e-4},
        "cheap": {"device": "cpu", "cost_per_token": 1e-6},
    }
    wanted = ask(prompt_tokens=100, max_tokens=100)
    hardware = Router(fleet_of(**{k: dict(v) for k, v in facts.items()}), weights=Weights(price=0))
    assert hardware.choose(wanted).chosen == "dear"
    price = Router(fleet_of(**facts), weights=Weights(price=1000))
    assert price.choose(wanted).chosen == "cheap"


def test_an_engine_that_was_slow_once_gets_requests_again():
    """What is learned is of its kind; one answer does not condemn an engine."""
    fleet = fleet_of(a={}, b={})
    router = Router(fleet, seed=1)
    for number in range(20):
        served(fleet, "b", ask(str(number), prompt_tokens=100 + number), 0.02, 0.01)
    served(fleet, "a", ask("slow", prompt_tokens=100), 2.0, 0.5)
    went = set()
    for number in range(12):
        request = ask(f"x{number}", prompt_tokens=100)
        name = router.choose(request).chosen
        went.add(name)
        fleet.sent(name, request)
    assert went == {"a", "b"}


def test_an_engine_that_is_slow_is_found_out():
    fleet = fleet_of(a={}, b={})
    for number in range(40):
        served(fleet, "b", ask(str(number), prompt_tokens=100 + number), 0.02, 0.01)
        served(fleet, "a", ask(str(number), prompt_tokens=100 + number), 0.2, 0.1)
    parts = choose(fleet, "composite", prompt_tokens=120, max_tokens=10).candidates()
    for part in ("prompt_s", "output_s"):
        assert parts["a"][part] > 2.5 * parts["b"][part]


# decisions


def test_a_decision_says_why_in_words_and_as_data():
    fleet = fleet_of(a={}, b={"features": CHAT}, c={"accepting": False})
    decision = choose(fleet, "composite", max_tokens=16)
    assert decision.explain().splitlines() == [
        "decision 1: r to a by composite",
        "  a: cost_s 0.436, waiting_s 0, prompt_s 0.0001, output_s 0.336, others_s 0, crowded_s 0, hardware_s 0.1, "
        "price_s 0, cached_tokens 0, guessed nothing was seen of its kind: taken to be as fast as the fastest",
        "  b: refused, does not serve llm_generate",
        "  c: refused, takes no requests now",
    ]
    data = decision.to_dict()
    assert data["chosen"] == "a" and data["refused"]["c"] == ["takes no requests now"]
    assert data["candidates"]["a"]["cost_s"] == pytest.approx(0.4361)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decisions_stay_as_they_were_when_the_fleet_goes_on(strategy):
    """Their scores are made again when they are read, from what was there when they were made."""
    fleet = fleet_of(a={"cost_per_token": 1e-6}, b={"device": "cuda"})
    served(fleet, "a", ask("0", chunks=(1, 2), prompt_tokens=150), 0.1, 0.01)
    router = Router(fleet, strategy, clock=lambda: 0.0)
    told = router.choose(ask(chunks=(1, 2, 3), prompt_tokens=200, deadline_ms=50)).explain()
    fleet.set_load("a", EngineLoad(running=9, waiting=5, kv_use=0.97))
    fleet.sent("a", ask(chunks=(1, 2, 3), prompt_tokens=200))
    fleet.first_token("a", ask(), 3.0)
    served(fleet, "b", ask("1", chunks=(1, 2, 3)), 0.5, 0.1)
    fleet.finished("a", ask(), 900, 0.2)
    router.change_strategy("round_robin")
    fleet.remove("b")
    for number in range(9):
        fleet.add(f"new-{number}", model_id="n")
    assert router.decisions[0].explain() == told


def test_the_last_decisions_are_kept():
    fleet = fleet_of(a={"max_concurrent": 2})
    router = Router(fleet, keep=3)
    for _ in range(5):
        router.choose(ask())
    assert [decision.number for decision in router.decisions] == [3, 4, 5]
    fleet.sent("a", ask("1"))
    fleet.sent("a", ask("2"))
    with pytest.raises(NoEngine):
        router.choose(ask())
    assert router.decisions[-1].number == 5  # waiting would fill the list


def test_bad_names_are_one_line():
    fleet = fleet_of(a={})
    with pytest.raises(UserError, match=r"unknown strategy 'best'; accepted: composite, "):
        Router(fleet, "best")
    with pytest.raises(UserError, match="engine id 'a' is in use"):
        fleet.add("a", model_id="m")
    with pytest.raises(UserError, match="unknown engine 'z'"):
        fleet.remove("z")
    fleet.sent("a", ask())
    with pytest.raises(UserError, match="request 'r' is at 'a' already"):
        fleet.sent("a", ask())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_decision_takes_the_same_calls_with_8_engines_as_with_64(strategy):
    meta = RequestMetadata(request_id="r", model_name=speed.MODEL, request_type="llm_chat", max_tokens=64)
    counts = []
    for engines in (8, 64):
        fleet = speed.fleet(engines)
        for number, name in enumerate(fleet):  # no two alike: a tie costs a comparison more
            fleet.set_load(name, EngineLoad(running=number))
            fleet.columns.turn[number] = number + 1
        (body,) = speed.bodies(1, seed=0)
        fleet.sent(next(iter(fleet)), ask_of(speed.PATH, body, meta))
        counts.append(speed.calls_of(Router(fleet, strategy), body, meta))
    assert counts[0] == counts[1] < 100


def test_a_decision_is_plain_data():
    """It goes out as JSON."""
    data = choose(fleet_of(a={}), "slo", deadline_ms=5).to_dict()
    assert not any(isinstance(value, np.generic) for value in data["candidates"]["a"].values())
