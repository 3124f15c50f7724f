"""LMDeploy's OpenAI server, `lmdeploy serve api_server`, as its version 0.16 says: it needs a GPU, and was not run."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.adapters.dialect import Dialect
from sagellm.control_plane.adapters.programs import flags, program, visible
from sagellm.errors import unknown

DEVICES = ("cuda", "ascend", "maca", "camb")
BACKENDS = ("turbomind", "pytorch")
KV_DTYPES = ("int4", "int8", "fp8", "fp8_e4m3", "fp8_e5m2")


class LMDeployDialect(Dialect):
    """What is not said is sampled there at temperature 0.8 from 50 tokens; a list of token ids is a list of prompts;
    an engine that sleeps is healthy; errors are bare."""

    def asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        body = {"temperature": 1.0, "top_p": 1.0} | {k: v for k, v in body.items() if v is not None}
        body["top_k"] = 1 if body["temperature"] == 0 else max(0, body.get("top_k", 0))
        if path == "/v1/completions" and "max_completion_tokens" not in body:
            body.setdefault("max_tokens", 16)
        return body

    def chunk(self, body, chunk):
        for choice in chunk.get("choices", ()):
            choice.setdefault("finish_reason", None)
        return chunk

    def well(self, answer: Any) -> bool:
        return answer["status"] != "sleeping"


class LMDeployAdapter(ServerAdapter):
    """Requests end when their client goes. It makes no vectors; stop strings end an output only where a token holds
    one whole, and are refused, as are penalties but for repetition, which it ignores."""

    KIND = "lmdeploy"
    MISSING = (
        "install it with: pip install lmdeploy; or let SAGELLM_PROGRAM_LMDEPLOY say where its `lmdeploy` is"
    )
    FEATURES = frozenset(
        {"chat", "completions", "seed", "top_k", "min_p", "repetition_penalty", "ignore_eos"}
    )
    METRICS = {
        "running": ("lmdeploy:num_requests_running",),
        "waiting": ("lmdeploy:num_requests_waiting",),
        "kv_use": ("lmdeploy:gpu_cache_usage_perc",),
        "prompt": ("lmdeploy:prompt_tokens_total",),
        "generated": ("lmdeploy:generation_tokens_total",),
        "reused": ("lmdeploy:cached_tokens_total",),
    }

    def __init__(self, *where: Any, **named: Any):
        super().__init__(*where, **named)
        self.endpoint = LMDeployDialect(self.endpoint, self.KIND, self.FEATURES)

    @classmethod
    def command(cls, options: EngineOptions, port: int) -> list[str]:
        options.refuse(cls.KIND, "pipeline_parallel")
        cls.environment(options)
        for what, value, accepted in (
            ("backend", options.backend, BACKENDS),
            ("kv_schema", options.kv_schema, KV_DTYPES),
        ):
            if value is not None and value not in accepted:
                raise unknown(f"{what} for LMDeploy", value, accepted)
        given = {
            "--server-name": options.host,
            "--server-port": port,
            "--model-name": options.served_model_name,
            "--backend": options.backend,
            "--device": options.device and options.device.partition(":")[0],
            "--quant-policy": options.kv_schema,
            "--tp": options.tensor_parallel if options.tensor_parallel > 1 else None,
            "--max-batch-size": options.max_concurrent,
            "--session-len": options.max_model_len,
        }
        start = [program(cls.KIND, "lmdeploy"), "serve", "api_server", options.model]
        return [*start, *flags(given), "--enable-prefix-caching", *options.extra]

    @classmethod
    def environment(cls, options: EngineOptions):
        return visible(options.device, DEVICES)

    async def discover(self) -> None:
        """Its server tells the model's name alone; how long a context may be is known where it was started here."""
        await super().discover()
        if self._options is not None and self._capability is not None:
            self._capability = evolve(self._capability, max_sequence_length=self._options.max_model_len)
