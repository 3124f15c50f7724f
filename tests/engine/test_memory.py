"""An engine that has served many requests is as large as one that has served few."""

import os

import psutil
import pytest
from checkpoints import random_tokens

from sagellm.batch import SamplingParams
from sagellm.engine.engine import SageLLMEngine

pytest_plugins = ["checkpoints"]

REQUESTS = 10_000


@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "no prefix caching"])
def test_memory_is_flat_over_ten_thousand_requests(text_checkpoint, caching):
    """All different, some sampled, some cut short by their reader. RSS within 2 % from two thousand on."""
    rss = psutil.Process(os.getpid()).memory_info
    with SageLLMEngine(str(text_checkpoint), max_sequences=64, prefix_caching=caching) as engine:

        def serve(first, count):
            for start in range(first, first + count, 250):
                prompts = [random_tokens(20, seed) for seed in range(start, start + 250)]
                engine.generate(prompts, SamplingParams(max_tokens=3, temperature=1.0, stop=("e",)))
                cut_short = engine.stream(prompts[0], SamplingParams(max_tokens=50, ignore_eos=True))
                next(cut_short)
                cut_short.close()

        serve(0, 2_000)
        before = rss().rss
        serve(2_000, REQUESTS)
        assert rss().rss <= before * 1.02, f"{before >> 20} MiB grew to {rss().rss >> 20} MiB"
        stats = engine.stats()
        assert stats.running == stats.waiting == stats.kv_blocks_used == engine.front.live == 0
        assert sum(stats.finished.values()) >= 12_000
