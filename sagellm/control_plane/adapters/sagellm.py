"""`sagellm serve` in a process of its own."""

from __future__ import annotations

import sys

from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.features import ALL


class SageLLMAdapter(ServerAdapter):
    KIND = "sagellm"
    MISSING = "install it with: pip install sagellm"
    FEATURES = ALL
    METRICS = {
        "running": ("sagellm_running_sequences",),
        "waiting": ("sagellm_waiting_sequences",),
        "kv_use": ("sagellm_kv_use_ratio",),
        "prompt": ("sagellm_prompt_tokens_total",),
        "generated": ("sagellm_generated_tokens_total",),
        "reused": ("sagellm_reused_tokens_total",),
    }

    @classmethod
    def command(cls, options: EngineOptions, port: int) -> list[str]:
        options.refuse(cls.KIND, "pipeline_parallel")
        if options.backend is not None and options.device is not None:
            options.refuse(cls.KIND, "backend")
        given = {
            "--host": options.host,
            "--port": port,
            "--served-model-name": options.served_model_name,
            "--device": options.device or options.backend,
            "--kv-schema": options.kv_schema,
            "--tensor-parallel": options.tensor_parallel if options.tensor_parallel > 1 else None,
            "--max-sequences": options.max_concurrent,
            "--max-model-len": options.max_model_len,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        command = [sys.executable, "-m", "sagellm", "serve", options.model]
        return [*command, *words, *options.extra]
