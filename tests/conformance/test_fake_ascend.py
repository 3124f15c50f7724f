"""The whole engine on the fake Ascend: scheduler, graphs, streams, aborts and copies to the host, through torch_npu's
own host code."""

import forked
import pytest

from sagellm.conformance.fake_cann.build import Unavailable, build
from sagellm.conformance.models import write_model

SCRIPT = """
import asyncio, sys
import numpy as np
import torch
torch.set_num_threads(1)
from sagellm.batch import SamplingParams
from sagellm.conformance.fake_cann.load import fake_ascend
from sagellm.engine.base import GenerateRequest
from sagellm.engine.engine import SageLLMEngine

random = np.random.default_rng(0)
prompts = [random.integers(0, 300, n).tolist() for n in (5, 40, 140, 3, 200)]
some = SamplingParams(max_tokens=12)

with fake_ascend() as seen:
    def engine(**settings):
        return SageLLMEngine(sys.argv[1], device="ascend", max_sequences=4, max_length=384, **settings)

    with engine() as one:
        capability = one.get_capability()
        assert (capability.backend, capability.device) == ("ascend", "npu")
        batch = [r.token_ids for r in one.generate(prompts, some)]
        assert [len(t) for t in batch] == [12] * 5
        assert seen.replays > 10, "steps of decodes are replayed graphs"
        assert list(one.stream(prompts[4], some))[-1].finish_reason == "length"
        assert one.stats().reused >= 128
        drawn = SamplingParams(max_tokens=8, temperature=0.8, top_k=20, top_p=0.9, seed=3, logprobs=2)
        first = [one.generate([prompts[0]], drawn)[0] for _ in range(2)]
        assert first[0].token_ids == first[1].token_ids
        filtered = seen.calls["npu::npu_top_k_top_p"]
        assert filtered > 0
        wide = SamplingParams(max_tokens=4, temperature=0.8, top_k=1025, top_p=0.9, seed=3)
        assert len(one.generate([prompts[0]], wide)[0].token_ids) == 4
        assert seen.calls["npu::npu_top_k_top_p"] == filtered, "k is more than the call takes"

        async def leaves():
            request = GenerateRequest(id="gone", prompt=prompts[2], sampling=SamplingParams(max_tokens=200))
            stream = one.stream(request)
            async for event in stream:
                if event.index == 3:
                    assert await one.abort("gone")
            return stream.result

        assert asyncio.run(leaves()).finish_reason == "abort"
        stats = one.stats()
        assert stats.kv_blocks_used == 0 and stats.failed_steps == 0 and stats.running == 0

    with engine(enforce_eager=True) as plain:
        replayed = seen.replays
        assert [r.token_ids for r in plain.generate(prompts, some)] == batch
        assert seen.replays == replayed
    print(seen.wrong)
    assert not seen.wrong
"""


def test_an_engine_serves_over_the_host_code_of_torch_npu(tmp_path):
    try:
        build()
    except Unavailable as reason:
        pytest.skip(str(reason))
    folder = write_model(tmp_path / "model", "qwen3")
    done = forked.python(SCRIPT, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
