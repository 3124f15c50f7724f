"""`sagellm engine verify`: an engine that keeps the promises passes, and whatever breaks one is caught by its check."""

import asyncio
import itertools
import json
import re

import pytest
from attrs import evolve
from planes import run
from third_party import LONGEST, Echo

from sagellm.cli import capture
from sagellm.control_plane import verify
from sagellm.control_plane.app import make_app
from sagellm.control_plane.endpoint import AppEndpoint, Endpoint, Reply
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.remote import RemoteEngine
from sagellm.control_plane.verify import ENGINE, SERVER, STOPPED, Suite
from sagellm.engine.base import EngineState, GenerateRequest, Health
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError
from sagellm.target import CapabilityDescriptor

pytestmark = pytest.mark.contract


class Otherwise(CapabilityDescriptor):
    """Reads as the class that it is not."""

    def to_json(self):
        return super().to_json().replace("Otherwise", "CapabilityDescriptor")


def answers(change):
    """generate() with a changed result: change(engine, result, request)."""

    async def generate(self, work, sampling=None):
        result = await Echo.generate(self, work, sampling)
        change(self, result, work)
        return result

    return {"generate": generate}


def pieces(change):
    """stream() with changed events; generate() stays right."""

    async def stream(self, work, sampling=None):
        async for event in self.events(work):
            yield change(event)

    return {"stream": stream}


def says(text):
    return lambda engine, result, work: setattr(result.outputs[0], "text", text(engine, result, work))


def ends(reason):
    return lambda engine, result, work: setattr(result.outputs[0], "finish_reason", reason)


async def nothing(self, *given):
    return None


def raising(error):
    def method(self, *given, **more):
        raise error

    return method


async def slow(self):
    await asyncio.sleep(0.3)
    return Health(EngineState.READY)


async def lost(self):
    return Health(EngineState.ERROR, "lost")


async def as_before(self):
    return Health(EngineState.READY)


def numbered(engine, result, work):
    engine.calls = getattr(engine, "calls", 0) + 1
    return f"answer {engine.calls}"


async def mixed(self, work, sampling=None):
    """What another request says, when there is one."""
    result = await Echo.generate(self, work, sampling)
    if len(self.running) > 1:
        result.outputs[0].text = "of another"
    return result


def with_stop(engine, result, work):
    return result.text + "".join(work.sampling.stop)


def vectors(change):
    async def embed(self, texts, pooling="mean", normalize=True):
        return change(await Echo.embed(self, texts))

    return {"embed": embed}


async def chat_without_end(self, messages, sampling=None):
    result = await Echo.chat(self, messages, sampling)
    result.outputs[0].finish_reason = None
    return result


async def says_hello(self, messages, sampling=None):
    """Whatever it is told."""
    return await self.generate(GenerateRequest(prompt="hello", sampling=sampling))


async def yes(self, request_id):
    await Echo.abort(self, request_id)
    return True


async def no(self, request_id):
    await Echo.abort(self, request_id)
    return False


async def does_not_end(self, request_id):
    return request_id in self.running


def takes_all(self, prompt, how):
    return Echo.output(self, prompt[:LONGEST], how)


def refusing(error):
    def output(self, prompt, how):
        if len(prompt) > LONGEST:
            raise error
        return Echo.output(self, prompt, how)

    return {"output": output}


def ends_those_beside(self, prompt, how):
    if len(prompt) > LONGEST:
        self.running.clear()
    return Echo.output(self, prompt, how)


def forgets_to_end(self, work):
    self.running.add("never ended")
    return Echo.events(self, work)


async def still_ready(self, drain_s=30):
    return None


async def still_serves(self, drain_s=30):
    self.stopped = True


STOPPED_IN_NAME = {
    "stop": still_serves,
    "state": property(
        lambda self: EngineState.STOPPED if getattr(self, "stopped", False) else Echo.state.fget(self)
    ),
    "health": lambda self: asyncio.sleep(0, Health(self.state)),
}

ENGINES = [
    ("ready", {"start": nothing}, "state EngineState.STARTING"),
    ("ready", {"health": lost}, "health Health"),
    ("ready", {"health": slow}, "health took"),
    ("ready", {"engine_id": property(lambda self: "", lambda self, value: None)}, "engine_id or model_id is empty"),
    ("capability", {"get_capability": lambda self: {}}, "AttributeError"),
    ("capability", {"get_capability": lambda self: Otherwise.from_dict(
        Echo.get_capability(self).to_dict() | {"schema": "Otherwise"})}, "another one behind JSON"),
    ("kv_schema", {"get_kv_schema": lambda self: None}, "AttributeError"),
    ("generates", answers(says(numbered)), "'answer 1', then 'answer 2'"),
    ("generates", answers(ends(None)), "finish_reason is None"),
    ("generates", answers(lambda _, result, __: result.token_ids.extend([1] * 12)), "24 tokens of 12"),
    ("generates", answers(lambda _, result, __: setattr(result, "prompt_tokens", 0)), "prompt_tokens is 0"),
    ("generates", {"generate": raising(RuntimeError("one\ntwo"))}, "RuntimeError: one$"),
    ("streams", pieces(lambda event: evolve(event, text="x")), "differs from generate's"),
    ("streams", pieces(lambda event: evolve(event, index=event.index // 2)), "index 0 where 1 follows"),
    ("streams", pieces(lambda event: evolve(event, finish_reason=None)), "ends with None"),
    ("streams", pieces(lambda event: evolve(event, finish_reason="length")), "before the end"),
    ("at_once", {"generate": mixed}, "[5-8] of 8 differ"),
    ("seeds", answers(says(numbered)), "two texts"),
    ("stops", answers(says(with_stop)), "with stop 'pon'"),
    ("stops", answers(ends("length")), "finish_reason is 'length'"),
    ("chats", {"chat": chat_without_end}, "finish_reason is None"),
    ("streams_chats", {"chat": says_hello}, "'Say somethin' where chat.. says 'hellohellohe'"),
    ("embeds", vectors(lambda found: found[0]), "the shape is"),
    ("embeds", vectors(lambda found: found * 2), "lengths are not 1"),
    ("embeds", vectors(lambda found: found[::-1]), "the order"),
    ("aborts", {"abort": yes}, "True for an id that nobody has"),
    ("aborts", {"abort": no}, "False for a request that runs"),
    ("aborts", {"abort": does_not_end}, "it ended with 'length'"),
    ("refuses", {"output": takes_all}, "was taken"),
    ("refuses", refusing(UserError("one\ntwo")), "several lines"),
    ("refuses", refusing(ValueError("too long")), "ValueError: too long"),
    ("refuses", {"output": ends_those_beside}, "a request beside it ended with 'abort'"),
    ("takes_plain_profile", {"load_quant_profile": raising(NotImplementedError("later"))}, "NotImplementedError"),
    ("tells_load", {"stats": lambda self: {}}, "it is a dict"),
    ("tells_load", {"stats": lambda self: EngineLoad(generated=0)}, "generated is 0"),
    ("tells_load", {"events": forgets_to_end}, "running 1"),
    ("stopped", {"stop": still_ready}, "state EngineState.READY"),
    ("stopped", {"health": as_before}, "health says that it is ready"),
    ("stopped", STOPPED_IN_NAME, "a request was taken"),
]  # fmt: skip


def outcomes(results):
    return {result.promise: result for result in results}


def promise(name):
    """Of the check with this name."""
    (check,) = (c for s in (ENGINE, SERVER, STOPPED) for c in s.checks if c.__name__ == f"_{name}")
    return check.__doc__.strip()


def test_a_third_partys_engine_that_keeps_the_promises_passes():
    results = run(verify.verify(Echo()))
    assert {result.outcome for result in results} == {"kept"}, results
    assert len(results) == len(ENGINE.checks) + len(STOPPED.checks)


@pytest.mark.parametrize(("name", "methods", "said"), ENGINES)
def test_a_broken_promise_of_an_engine_is_caught(name, methods, said, monkeypatch):
    if methods.get("health") is slow:
        monkeypatch.setattr(verify, "HEALTH_SECONDS", 0.2)
    engine = type("Broken", (Echo,), methods)()
    found = outcomes(run(verify.verify(engine)))[promise(name)]
    assert found.outcome == "broken"
    assert re.search(said, found.detail)


def test_what_an_engine_says_itself_that_it_cannot_do_is_not_broken():
    cannot = raising(UserError("not here"))
    methods = {
        "get_kv_schema": cannot,
        "embed": cannot,
        "chat": says_hello,
        "chat_prompt": lambda *given: None,
    }
    found = outcomes(run(verify.verify(type("Little", (Echo,), methods)())))
    for name in ("kv_schema", "embeds"):
        assert (found[promise(name)].outcome, found[promise(name)].detail) == ("not offered", "not here")
    assert found[promise("streams_chats")].outcome == "not offered"
    assert sum(result.outcome != "kept" for result in found.values()) == 3


def test_a_check_that_gets_no_answer_ends(monkeypatch):
    monkeypatch.setattr(verify, "CHECK_SECONDS", 0.05)
    engine = type("Silent", (Echo,), {"health": lambda self: asyncio.sleep(60)})()
    (found,) = run(Suite(ENGINE.checks[:1]).run(engine))
    assert (found.outcome, found.detail) == ("broken", "no answer within 0.05 s")


# a server: our control plane in front of that engine, with one answer changed


class Changed(Endpoint):
    """Answers of one route, changed: change(status, headers, body) gives the three."""

    def __init__(self, server, path, change):
        self.server, self.path, self.change = server, path, change

    async def send(self, method, path, body=None, headers=None, timeout=None):
        reply = await self.server.send(method, path, body, headers, timeout)
        if path != self.path:
            return reply
        status, headers, body = self.change(reply.status, dict(reply.headers), await reply.read())

        async def pieces():
            yield body

        return Reply(status, headers, pieces(), reply.aclose)

    async def aclose(self):
        return None


def status(number):
    return lambda status, headers, body: (number, headers, body)


def put(*path, value):
    """Something in the answer's JSON; streams, which are none, stay as they are."""

    def change(status, headers, body):
        if body[:1] == b"{":
            at = given = json.loads(body)
            for name in path[:-1]:
                at = at[name]
            at[path[-1]] = value
            body = json.dumps(given).encode()
        return status, headers, body

    return change


def replaced(old, new):
    return lambda status, headers, body: (status, headers, body.replace(old, new))


def metrics(*texts):
    said = itertools.chain(texts, itertools.repeat(texts[-1]))
    return lambda status, headers, body: (200, headers, f"# TYPE some_running gauge\n{next(said)}\n".encode())


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SERVERS = [
    ("chat_of_planes", CHAT, status(422), "422"),
    ("chat_of_planes", CHAT, put("choices", 0, "message", "role", value="user"), "no assistant's message"),
    ("chat_of_planes", CHAT, put("usage", "completion_tokens", value=5), "usage is"),
    ("text_of_planes", TEXT, status(400), "400"),
    ("text_of_planes", TEXT, put("choices", 0, "text", value=None), "no text"),
    ("sse", CHAT, status(500), "500"),
    ("sse", CHAT, lambda status, headers, body: (status, {"content-type": "text/plain"}, body), "'text/plain'"),
    ("sse", CHAT, replaced(b"data: [DONE]", b""), "the stream broke off"),
    ("sse", CHAT, replaced(b'"usage"', b'"used"'), "no chunk has the usage"),
    ("unknown_model", CHAT, status(400), "it is 400"),
    ("unknown_model", CHAT, put("error", value="no such model"), "the body is"),
    ("bad_body", CHAT, status(500), "it is 500"),
    ("bad_body", CHAT, status(200), "it is 200"),
    ("bad_body", "/health", status(503), "/health is 503"),
    ("gone", "/metrics", metrics('some_running{model="m"} 1.0'), "it still runs"),
]  # fmt: skip


def verified(path=None, change=None, names=None):
    """The outcomes of a server; of all promises, or those with these names."""

    async def main():
        manager = ControlPlaneManager(probe_every=0.05)
        await manager.start()
        engine = Echo()
        await engine.start()
        manager.register_engine("third", engine)
        await manager.wait_until_ready("third")
        server = AppEndpoint(make_app(manager))
        if names is None:
            results = await verify.verify(RemoteEngine(Changed(server, path, change) if path else server))
        else:
            checks = tuple(check for check in SERVER.checks if check.__name__.strip("_") in names)
            results = await Suite(checks).run(verify.Server(Changed(server, path, change), "echo-1"))
        await manager.stop(0)
        return outcomes(results)

    return run(main())


def test_a_third_partys_engine_behind_the_control_plane_passes_as_a_server():
    found = verified()
    assert {result.promise for result in found.values() if result.outcome == "not offered"} == {
        promise("kv_schema"), promise("streams_chats"),
        "A client that goes away ends its request: the server is idle soon after.",
    }, found  # fmt: skip
    assert not [result for result in found.values() if result.outcome == "broken"]
    assert len(found) == len(ENGINE.checks) + len(SERVER.checks) + len(STOPPED.checks)


def test_a_server_that_notices_that_its_client_is_gone():
    found = verified("/metrics", metrics("some_running 1.0", "some_running 0.0"), {"gone"})
    assert found[promise("gone")].outcome == "kept"


@pytest.mark.parametrize(("name", "path", "change", "said"), SERVERS)
def test_a_broken_promise_of_a_server_is_caught(name, path, change, said, monkeypatch):
    monkeypatch.setattr(verify, "IDLE_SECONDS", 0.3)
    found = verified(path, change, {name})[promise(name)]
    assert found.outcome == "broken" and said in found.detail


def test_every_promise_has_something_that_breaks_it():
    every = {check.__name__.strip("_") for suite in (ENGINE, SERVER, STOPPED) for check in suite.checks}
    assert {name for name, *_ in ENGINES + SERVERS} == every


# the command


def test_the_command_says_which_promises_are_kept():
    done = capture(["engine", "verify", "third_party:Echo"])
    count = len(ENGINE.checks) + len(STOPPED.checks)
    assert done.code == 0 and f"{count} of {count} promises kept or not offered" in done.stdout


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("third_party:Nobody", "'third_party:Nobody' was not found"),
        ("no_such_module:Echo", "accepted: a URL, or module:object"),
        ("third_party", "accepted: a URL, or module:object"),
        ("third_party:LONGEST", "'third_party:LONGEST' gives a int; accepted: a BaseInferenceEngine"),
        ("builtins:dict", "'builtins:dict' gives a dict; accepted: a BaseInferenceEngine"),
    ],
)
def test_what_is_no_engine_is_one_line(place, said):
    with pytest.raises(UserError, match=said):
        verify.load(place)


def test_places_are_an_address_an_object_or_what_makes_one(monkeypatch):
    import third_party

    assert verify.load("http://127.0.0.1:9/v1/").endpoint.address == "http://127.0.0.1:9"
    assert isinstance(verify.load("third_party:Echo"), Echo)
    one = Echo()
    monkeypatch.setattr(third_party, "ONE", one, raising=False)
    assert verify.load("third_party:ONE") is one
