"""A test for each class of advisory that hit other servers of models."""

import ast
import json
import struct
from pathlib import Path

import httpx
import msgpack
import psutil
import pytest
from checkpoints import save_checkpoint, save_tokenizer
from serving import server

from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.wire import pack, unpacker
from sagellm.errors import UserError

pytest_plugins = ["checkpoints"]

ROOT = Path(__file__).parents[2] / "sagellm"
KEY = "sk-right"
TEMPLATE_BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Of a model whose folder has code for `auto_map` and a bomb for a template; the core in its process."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder, template=TEMPLATE_BOMB)
    save_checkpoint(folder, "LlamaForCausalLM", eos_token_id=0, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": names}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with server("-m", str(folder), "--served-model-name", "m", "--api-key", KEY) as (process, address):
        yield folder, process, address


def ask(address, path="/v1/completions", key=KEY, **body):
    headers = {"Authorization": f"Bearer {key}"}
    given = {"model": "m", "max_tokens": 2} | body
    return httpx.post(f"{address}{path}", json=given, headers=headers, timeout=60)


# deserialisation over sockets


def test_nothing_listens_but_http(served):
    """The core is reached over a socket pair, which no other process can connect to."""
    _, process, address = served
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > 1
    ports = {c.laddr.port for p in family for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert ports == {int(address.rsplit(":", 1)[1])}


def test_a_message_makes_only_values_that_are_named(served):
    for evil in ({"!": "system", "command": "id"}, {"!": "Popen", "args": ["id"]}, {"!": "__reduce__"}):
        reader = unpacker()
        reader.feed(msgpack.packb(["submit", evil]))
        with pytest.raises(KeyError):
            list(reader)
    object_array = {"!": "array", "dtype": "|O", "shape": [1], "data": struct.pack("q", 1)}
    reader = unpacker()
    reader.feed(msgpack.packb([object_array]))
    with pytest.raises(ValueError):
        list(reader)
    assert b"pickle" not in pack(("call", 1, "stats", ()))


DANGEROUS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CODE = {("backends/plan.py", "exec")}
"""Emitted programs are run: text of our own code generators, never of a request or a file."""


def test_no_pickle_and_no_eval_in_the_tree():
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not DANGEROUS & {alias.name.split(".")[0] for alias in node.names}, name
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in DANGEROUS, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("eval", "exec", "compile", "__import__"):
                    assert (name, called) in CODE or (called == "compile" and name == "backends/plan.py"), (
                        name
                    )
                assert called not in ("torch.load", "np.load", "numpy.load", "os.system", "os.popen"), name
                shell = [k for k in node.keywords if k.arg in ("shell", "allow_pickle", "trust_remote_code")]
                assert not shell, (name, node.lineno)
                if called == "yaml.load":
                    assert name == "documents.py", name  # with a loader that makes plain values only


# models that bring code, templates that never end


def test_auto_map_runs_nothing(served):
    folder, _, address = served
    assert ask(address, prompt="x").status_code == 200
    assert not (folder / "ran").exists()


def test_pickled_weights_are_not_read(tmp_path):
    save_tokenizer(tmp_path)
    save_checkpoint(tmp_path, "LlamaForCausalLM")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        SageLLMEngine(str(tmp_path))


def test_a_template_that_never_ends_is_stopped_and_others_are_served(served):
    _, _, address = served
    answer = ask(address, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert (
        answer.status_code == 400 and "the chat template does too much" in answer.json()["error"]["message"]
    )
    assert ask(address, prompt="x").status_code == 200


@pytest.mark.parametrize(
    "field", ["chat_template", "prompt_embeds", "mm_processor_kwargs", "lora_request", "kv_transfer_params"]
)
def test_templates_tensors_and_files_do_not_come_from_a_request(served, field):
    """Prompt embeddings were read by torch.load elsewhere, templates of a request were bombs."""
    _, _, address = served
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = ask(address, path, messages=[{"role": "user", "content": "x"}], prompt="x", **{field: "x"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    image = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]
    assert (
        ask(address, "/v1/chat/completions", messages=[{"role": "user", "content": image}]).status_code == 400
    )


def test_nobody_gives_the_template_a_name_of_its_own(served):
    """`chat_template_kwargs` are variables of the template: those that the server sets itself stay its own."""
    _, _, address = served
    for name in ("messages", "tools", "add_generation_prompt", "chat_template", "self", "raise_exception"):
        messages = [{"role": "user", "content": "x"}]
        answer = ask(address, "/v1/chat/completions", messages=messages, chat_template_kwargs={name: "x"})
        assert answer.status_code == 400, name


# grammars, and numbers without a bound


@pytest.mark.parametrize(
    "body",
    [
        {"guided_regex": "((((a{1,9999}){1,9999}){1,9999}){1,9999})b"},
        {"guided_regex": "(a|aa|aaa)*b(a|b)*a(a|b){20}"},
        {"guided_regex": "a" * 100_000},
        {"guided_json": {"type": "integer", "multipleOf": 99991}},
        {
            "guided_json": {
                "allOf": [{"anyOf": [{"pattern": f"{i}{j}.*"} for j in range(9)]} for i in range(9)]
            }
        },
        {"guided_grammar": "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(3000))},
        {"guided_grammar": 'start: a\na: a a a | "x" | '},
        {"guided_choice": ["x"] * 100_000},
        {"guided_json": json.dumps({"a": 1}) * 50_000},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_grammar_bomb_is_refused_or_bounded(served, body):
    _, _, address = served
    assert ask(address, prompt="x", **body).status_code in (200, 400)
    assert ask(address, prompt="x").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"n": 129}, {"n": 10**9}, {"best_of": 10**9}, {"logprobs": 21}, {"prompt_logprobs": 21},
        {"stop": ["a"] * 17}, {"stop": "a" * 2000}, {"logit_bias": {str(i): 1 for i in range(1025)}},
        {"stop_token_ids": [1] * 65}, {"min_tokens": 10**9}, {"top_k": -2}, {"temperature": -1},
        {"prompt": ["x"] * 257},
        {"logit_bias": {"99999999": 1}}, {"prompt": [10**9]}, {"seed": 2**64}, {"cache_salt": "x" * 257},
    ],
    ids=lambda body: str(body)[:40],
)  # fmt: skip
def test_every_number_and_list_has_a_bound(served, body):
    _, _, address = served
    assert ask(address, **{"prompt": "x"} | body).status_code == 400


# what tenants may learn of each other, and keys


def test_what_another_tenant_sent_is_not_found_in_the_cache(served):
    """A hit shows in the time to the first token and in the usage: neither may tell what others asked."""
    _, _, address = served

    def cached(salt):
        usage = ask(
            address, prompt="The quick brown fox jumps over the lazy dog." * 3, cache_salt=salt
        ).json()
        return usage["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0 and cached("a") > 0
    assert cached("b") == 0 and cached(None) == 0


def test_every_route_wants_the_key(served):
    _, _, address = served
    headers = {"Authorization": f"Bearer {KEY}"}
    paths = httpx.get(f"{address}/openapi.json", headers=headers, timeout=60).json()["paths"]
    tried = [("openapi.json", "get"), ("docs", "get"), ("nowhere", "get")]
    tried += [(path.lstrip("/"), method) for path, methods in paths.items() for method in methods]
    client = httpx.Client(timeout=60)
    for path, method in tried:
        for wrong in (
            None,
            "",
            "Bearer",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            f"Basic {KEY}",
            KEY,
            "Bearer \xff",
        ):
            given = {} if wrong is None else {"Authorization": wrong.encode("latin-1")}
            status = client.request(method, f"{address}/{path}", headers=given).status_code
            assert status == (200 if path == "health" else 401), (path, wrong)


def test_keys_are_compared_in_constant_time():
    """Every comparison with a key is `hmac.compare_digest`, and with all keys, whichever fits."""
    tree = ast.parse((ROOT / "server" / "guard.py").read_text())
    (knows,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_knows"]
    calls = [ast.unparse(node.func) for node in ast.walk(knows) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest" in calls
    keys = [n for n in ast.walk(knows) if isinstance(n, ast.Compare) and "key" in ast.unparse(n)]
    assert not keys
