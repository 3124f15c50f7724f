"""The whole product in one page: a control plane, an engine behind it, one answer, and what it cost.

python examples/sagellm_minimal_demo.py
"""

import time

from sagellm.control_plane.client import UnifiedInferenceClient
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.engine.engine import SageLLMEngine


def main() -> None:
    manager = ControlPlaneManager()
    manager.register_engine("sagellm", SageLLMEngine(model="builtin"))
    with UnifiedInferenceClient.create(manager=manager) as client:
        times = [time.perf_counter()]
        for chunk in client.chat_stream([{"role": "user", "content": "你好"}], max_tokens=32, temperature=0):
            if text := chunk["choices"][0]["delta"].get("content"):
                print(text, end="", flush=True)
                times.append(time.perf_counter())
    ttft, tpot = times[1] - times[0], (times[-1] - times[1]) / max(1, len(times) - 2)
    print(f"\nTTFT {ttft * 1e3:.1f} ms, TPOT {tpot * 1e3:.2f} ms")
    print(manager.router.decisions[-1].explain())


if __name__ == "__main__":
    main()
