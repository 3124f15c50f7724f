"""The whole product in one page: an engine, one chat, and what it cost.

python examples/sagellm_minimal_demo.py
"""

import asyncio

from sagellm.batch import SamplingParams
from sagellm.engine.engine import SageLLMEngine


def main() -> None:
    engine = SageLLMEngine(model="builtin")
    messages = [{"role": "user", "content": "你好"}]
    result = asyncio.run(engine.chat(messages, SamplingParams(max_tokens=32)))
    print(result.text)
    print(f"TTFT {result.ttft * 1e3:.1f} ms, TPOT {result.tpot * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
