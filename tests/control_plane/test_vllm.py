"""vLLM itself beside two sageLLM engines, where `SAGELLM_PROGRAM_VLLM` says where it is: see tools/vllm_cpu.py.

Its server takes a minute or more to start, so there is one test, of one server's life.
"""

import asyncio
import os
import signal

import pytest
from recording import drive

from sagellm.batch import SamplingParams
from sagellm.control_plane.client import AsyncInferenceClient
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.routing.strategies import STRATEGIES
from sagellm.engine.base import GenerateRequest
from sagellm.engine.engine import SageLLMEngine
from sagellm.models.hub import resolve

pytestmark = pytest.mark.skipif(
    "SAGELLM_PROGRAM_VLLM" not in os.environ, reason="SAGELLM_PROGRAM_VLLM does not say where vLLM is"
)
MESSAGES = [{"role": "user", "content": "你好"}]
GREEDY = {"max_tokens": 24, "temperature": 0}


async def life(engines: list[SageLLMEngine], logs) -> None:
    name = engines[0].model_id
    manager = ControlPlaneManager(probe_every=0.2, logs=logs)
    await manager.start()
    options = {"served_model_name": name, "max_model_len": 512, "max_concurrent": 8}
    await manager.request_engine_startup(
        str(resolve("builtin")), "vllm", "vllm", **options, extra=("--dtype", "float32", "--enforce-eager")
    )
    for number, engine in enumerate(engines):
        manager.register_engine(f"sagellm-{number}", engine)
    for member in list(manager.members):
        await manager.wait_until_ready(member, 1200)
    vllm = manager.members["vllm"].engine

    found = await drive(vllm)
    assert found["longest"] == 512 and found["load"].generated

    # one question, three engines, one answer
    answers = {}
    async with await AsyncInferenceClient.create(manager=manager) as client:
        for strategy in STRATEGIES:
            manager.router.change_strategy(strategy)
            for _ in range(3):
                answer = await client.chat(MESSAGES, **GREEDY)
                decision = manager.router.decisions[-1]
                assert decision.strategy == strategy and set(decision.candidates()) == set(manager.members)
                answers.setdefault(decision.chosen, set()).add(answer["choices"][0]["message"]["content"])
        assert set(answers) == set(manager.members)
        assert len(set.union(*answers.values())) == 1

        # a request that is aborted leaves vLLM
        request = GenerateRequest(
            prompt="Once", id="a", sampling=SamplingParams(max_tokens=400, ignore_eos=True)
        )
        ends = None
        async for event in vllm.stream(request):
            ends = event.finish_reason
            await vllm.abort("a")
        assert ends == "abort"
        while (await vllm.refresh()).running:
            await asyncio.sleep(0.05)

        # a stream that began at vLLM goes on elsewhere when it is killed, and says what it would have said
        for number in range(len(engines)):
            manager.unregister_engine(f"sagellm-{number}")
        long, said = GREEDY | {"max_tokens": 200}, []
        whole = (await client.generate("Once upon a time", **long))["choices"][0]["text"]
        async for chunk in client.generate_stream("Once upon a time", **long):
            said += [choice["text"] for choice in chunk["choices"]]
            if len(said) == 5:
                manager.register_engine("sagellm", engines[0])
                await manager.wait_until_ready("sagellm")
                os.killpg(vllm.process.pid, signal.SIGKILL)
        assert "".join(said) == whole and manager.router.decisions[-1].chosen == "sagellm"
    await manager.stop(5)


def test_vllm_beside_two_sagellm_engines(tmp_path):
    settings = {"dtype": "float32", "max_length": 512}
    with SageLLMEngine("builtin", **settings) as one, SageLLMEngine("builtin", **settings) as other:
        asyncio.run(life([one, other], tmp_path))
