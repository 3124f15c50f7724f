"""What a control plane knows of engines and requests, in this process and on disk."""

import json

import pytest

from sagellm.control_plane.registry import Registry, state_folder
from sagellm.control_plane.types import EngineInfo, RequestMetadata, RequestPriority, RequestType
from sagellm.engine.base import EngineState
from sagellm.errors import UserError

pytestmark = pytest.mark.contract


def info(**given):
    return EngineInfo(**{"engine_id": "one", "model_id": "m"} | given)


def test_an_engine_says_how_it_is():
    one = info(host="::1", port=8001, state=EngineState.DRAINING)
    assert one.address == "http://[::1]:8001" and info(host="h", port=1).address == "http://h:1"
    assert (one.is_healthy, one.is_accepting_requests, one.is_terminal) == (True, False, False)
    one.consecutive_failures = 1
    assert not one.is_healthy and info(state=EngineState.STOPPED).is_terminal
    assert info().address is None
    shown = info(state=EngineState.READY).to_dict()
    assert shown["state"] == "ready" and shown["is_accepting_requests"] and json.dumps(shown)


def test_words_of_a_request_are_read():
    one = RequestMetadata(priority="high", request_type="embedding", embedding_texts=["a"])
    assert (one.priority, one.request_type) == (RequestPriority.HIGH, RequestType.EMBEDDING)
    shown = RequestMetadata(priority=0).to_dict()
    assert (shown["priority"], shown["request_type"]) == (0, "llm_generate") and json.dumps(shown)
    assert RequestMetadata().request_id != RequestMetadata().request_id


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: info(port=0), "port is 0; accepted: a port from 1 to 65535"),
        (lambda: info(port=True), "port is True; accepted: a port from 1 to 65535"),
        (lambda: info(engine_id=""), "engine_id is ''; accepted: a text that is not empty"),
        (lambda: RequestMetadata(priority="soon"),
         "unknown priority 'soon'; accepted: critical, high, normal, low, background"),
        (lambda: RequestMetadata(priority=9),
         "unknown priority '9'; accepted: critical, high, normal, low, background"),
        (lambda: RequestMetadata(request_type="chat"),
         "unknown request type 'chat'; accepted: llm_chat, llm_generate, embedding"),
    ],
)  # fmt: skip
def test_what_is_no_such_word_is_one_line(make, said):
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == said


def test_engines_at_an_address_survive_on_disk_and_objects_do_not(tmp_path):
    registry = Registry(tmp_path / "deep" / "engines.json")
    assert registry.read() == []
    one = info(host="h", port=1, metadata={"labels": {"zone": "a"}})
    registry.write([one, info(engine_id="object")], {})
    (again,) = registry.read()
    assert EngineInfo(**again) == one and registry.keys() == {}


def test_without_a_path_nothing_is_kept():
    registry = Registry(None)
    registry.write([info(host="h", port=1)], {"one": "secret"})
    assert registry.read() == [] and registry.keys() == {}


def test_keys_of_engines_are_in_a_file_that_its_owner_alone_can_read(tmp_path):
    registry, file = Registry(tmp_path / "engines.json"), tmp_path / "engines.keys"
    (tmp_path / "engines.keys.new").write_text("of a write that broke off")
    registry.write([info(host="h", port=1)], {"one": "secret"})
    assert registry.keys() == {"one": "secret"} and file.stat().st_mode & 0o777 == 0o600
    assert "secret" not in (tmp_path / "engines.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines.json", "engines.keys"]
    registry.write([], {})
    assert not file.exists()


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ('{"one": "secret"}', 0o644, "has the mode 644; accepted: 600, as it holds keys"),
        ("[1]", 0o600, "holds no keys"),
        ('{"one": 1}', 0o600, "holds no keys"),
        ("{", 0o600, "is no JSON"),
    ],
)
def test_a_file_of_keys_that_is_open_or_no_such_file_is_one_line(tmp_path, text, mode, said):
    file = tmp_path / "engines.keys"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(UserError, match=said) as refused:
        Registry(tmp_path / "engines.json").keys()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", '{"engines": 1}', '{"engines": [1]}'])
def test_a_file_that_is_no_registry_is_one_line(tmp_path, text):
    (tmp_path / "engines.json").write_text(text)
    with pytest.raises(UserError) as refused:
        Registry(tmp_path / "engines.json").read()
    assert "engines.json' is no registry" in str(refused.value) or "engines.json is no JSON" in str(
        refused.value
    )


def test_the_folder_for_state_is_the_users():
    assert str(state_folder({"SAGELLM_STATE": "/s"})) == "/s"
    assert str(state_folder({"XDG_STATE_HOME": "/x"})) == "/x/sagellm"
    assert state_folder({}).parts[-3:] == (".local", "state", "sagellm")
