"""Chitu's OpenAI server, `torchrun -m chitu`, as its sources of August 2026 say: it needs a GPU, and was not run."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.adapters.dialect import Dialect
from sagellm.control_plane.adapters.programs import flags, program, visible
from sagellm.control_plane.endpoint import EngineLost
from sagellm.control_plane.remote import PROBE_SECONDS
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError

DEVICES = ("cuda", "ascend")


class ChituDialect(Dialect):
    """What is not said is sampled there at temperature 0.8 from 50 tokens; the end of a chat has no reason; tokens
    found in the cache are counted elsewhere; errors are {"detail": ...}; there is no /health."""

    HEALTH = "/server_status"

    def asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        body = {"temperature": 1.0, "top_p": 1.0} | {k: v for k, v in body.items() if v is not None}
        body["top_k"] = body.get("top_k") or -1
        body.setdefault("stream_options", {"include_usage": False})
        if path == "/v1/completions":
            body["max_tokens"] = body.pop("max_completion_tokens", body.get("max_tokens", 16))
        return body

    def answered(self, body, answer):
        _count(answer)
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        full = most is not None and answer["usage"]["completion_tokens"] >= most
        for choice in answer["choices"]:
            called = choice.get("message", {}).get("tool_calls")
            choice.setdefault("finish_reason", "length" if full else "tool_calls" if called else "stop")
        return answer

    def chunk(self, body, chunk):
        if "detail" in chunk:
            return {
                "error": {"message": chunk["detail"], "type": "server_error", "param": None, "code": None}
            }
        _count(chunk)
        chunk["model"] = body["model"]
        if chunk["object"] == "chat.completion":
            chunk["object"] = "chat.completion.chunk"
        return chunk

    def well(self, answer: Any) -> bool:
        return answer["initialized"]


def _count(answer: dict[str, Any]) -> None:
    if usage := answer.get("usage"):
        usage["prompt_tokens_details"] = {"cached_tokens": usage.pop("cached_token", 0)}


class ChituAdapter(ServerAdapter):
    """A request whose client goes away is computed to its end there. It makes no vectors, and ignores seeds, stop
    strings and most penalties, so requests with these are refused."""

    KIND = "chitu"
    MISSING = "install Chitu, or let SAGELLM_PROGRAM_CHITU say where the `torchrun` of its environment is"
    FEATURES = frozenset({"chat", "completions", "token_ids", "top_k", "frequency_penalty", "ignore_eos"})

    def __init__(self, *where: Any, **named: Any):
        super().__init__(*where, **named)
        self.endpoint = ChituDialect(self.endpoint, self.KIND, self.FEATURES)

    @classmethod
    def command(cls, options: EngineOptions, port: int) -> list[str]:
        """`served_model_name` is a file of Chitu's config/models, which says what kind of model it is."""
        options.refuse(cls.KIND, "backend", "kv_schema")
        cls.environment(options)
        if options.served_model_name is None:
            raise UserError("served_model_name is None for Chitu; accepted: a name of its config/models")
        given = {
            "serve.host": options.host,
            "serve.port": port,
            "models": options.served_model_name,
            "models.ckpt_dir": options.model,
            "infer.tp_size": options.tensor_parallel,
            "infer.pp_size": options.pipeline_parallel,
            "infer.cache_type": "paged",
            "infer.enable_prefix_caching": True,
            "infer.max_batch_size": options.max_concurrent,
            "infer.max_seq_len": options.max_model_len,
        }
        ranks = options.tensor_parallel * options.pipeline_parallel
        start = [
            program(cls.KIND, "torchrun"),
            "--standalone",
            *flags({"--nproc_per_node": ranks}),
            "-m",
            "chitu",
        ]
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        return [*start, *words, *options.extra]

    @classmethod
    def environment(cls, options: EngineOptions):
        return visible(options.device, DEVICES)

    async def discover(self) -> None:
        """Its server tells the model's name alone; how long a context may be is known where it was started here."""
        await super().discover()
        if self._options is not None and self._capability is not None:
            self._capability = evolve(self._capability, max_sequence_length=self._options.max_model_len)

    async def refresh(self, timeout: float = PROBE_SECONDS) -> EngineLoad:
        """Its server counts requests; the rest it tells a Prometheus of its own."""
        reply = await self.endpoint.send("POST", "/load_status", timeout=timeout)
        answer = await reply.json()
        if reply.status != 200:
            raise EngineLost(f"/load_status answers {reply.status}")
        there, most = int(answer["handle_reqs"]), int(answer["max_batch_size"])
        self._load = EngineLoad(running=min(there, most), waiting=max(0, there - most))
        return self._load
