"""Record what an engine's own server answers, as test data.

python tests/control_plane/record.py http://127.0.0.1:8001 tests/control_plane/exchanges/vllm
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx

GREEDY = {"temperature": 0, "max_tokens": 6}
ASKED = [{"role": "user", "content": "你好"}]
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def questions(model: str) -> dict[str, tuple[str, str, dict | None]]:
    """Method, path and body by name."""
    chat = {"model": model, "messages": ASKED} | GREEDY
    text = {"model": model, "prompt": "Once upon a time"} | GREEDY
    return {
        "health": ("GET", "/health", None),
        "version": ("GET", "/version", None),
        "models": ("GET", "/v1/models", None),
        "chat": ("POST", "/v1/chat/completions", chat),
        "chat-stream": ("POST", "/v1/chat/completions", chat | STREAM),
        "completion": ("POST", "/v1/completions", text | {"logprobs": 1}),
        "completion-stream": ("POST", "/v1/completions", text | STREAM),
        "token-ids": (
            "POST",
            "/v1/completions",
            text | {"prompt": [5, 6, 7], "return_token_ids": True} | STREAM,
        ),
        "regex": ("POST", "/v1/completions", text | {"structured_outputs": {"regex": "[ab]{3}"}}),
        "embeddings": ("POST", "/v1/embeddings", {"model": model, "input": ["one", "two"]}),
        "tokenize": ("POST", "/tokenize", {"model": model, "prompt": "Once upon a time"}),
        "unknown-model": ("POST", "/v1/completions", text | {"model": "nobody"}),
        "bad-field": ("POST", "/v1/completions", text | {"temperature": -1}),
        "too-long": ("POST", "/v1/completions", text | {"max_tokens": 1_000_000}),
        "not-json": ("POST", "/v1/completions", None),
        "metrics": ("GET", "/metrics", None),
    }


def main(address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=address, timeout=300) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for name, (method, path, body) in questions(model).items():
            answer = client.request(method, path, json=body)
            kind = answer.headers.get("content-type", "").partition(";")[0]
            said = answer.json() if kind == "application/json" else answer.text
            if path == "/metrics":  # buckets and Python's own are of no interest
                lines = [line for line in answer.text.splitlines() if "_bucket{" not in line]
                said = (
                    "\n".join(line for line in lines if "python_" not in line and "process_" not in line)
                    + "\n"
                )
            kept = {
                "method": method,
                "path": path,
                "body": body,
                "status": answer.status_code,
                "type": kind,
                "answer": said,
            }
            (folder / f"{name}.json").write_text(
                json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8"
            )
            print(f"{name:<18}{answer.status_code}  {answer.text[:100]!r}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
