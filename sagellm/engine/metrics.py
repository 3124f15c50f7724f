"""An engine's statistics in Prometheus' text form, for a scraper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm.engine.stats import EngineStats

PREFIX = "sagellm_"

GAUGES = {
    "running": ("running_sequences", "Sequences that run."),
    "waiting": ("waiting_sequences", "Sequences that wait."),
    "kv_blocks": ("kv_blocks", "KV blocks on the device."),
    "kv_blocks_used": ("kv_blocks_used", "Of these, held by sequences."),
    "kv_blocks_cached": ("kv_blocks_cached", "Of these, held by none and kept to be found."),
    "kv_use": ("kv_use_ratio", "Part of the KV blocks that sequences hold."),
    "host_blocks": ("host_kv_blocks", "KV blocks in host memory."),
    "host_blocks_used": ("host_kv_blocks_used", "Of these, in use."),
}
COUNTERS = {
    "steps": ("steps", "Steps executed."),
    "forwarded": ("forwarded_tokens", "Tokens that went through the model."),
    "prompt": ("prompt_tokens", "Prompt tokens of the requests that began."),
    "generated": ("generated_tokens", "Tokens generated."),
    "shared": ("shared_tokens", "Prompt tokens that another sequence of the same step computed."),
    "reused": ("reused_tokens", "Known tokens found in the prefix cache."),
    "fetched": ("fetched_tokens", "Known tokens fetched from host memory."),
    "recomputed": ("recomputed_tokens", "Tokens computed again after their sequence was put back."),
    "verify_steps": ("verify_steps", "Steps that verified guessed tokens."),
    "drafted": ("drafted_tokens", "Tokens guessed."),
    "accepted": ("accepted_tokens", "Of these, the ones that were right."),
    "draft_steps": ("draft_steps", "Forwards of the draft model."),
    "offloaded_blocks": ("kv_blocks_offloaded", "KV blocks copied to host memory as they left the device."),
    "copied_blocks": ("kv_blocks_copied", "KV blocks copied before a write, as others held them."),
    "preemptions": ("preemptions", "Sequences put back as the KV cache was full."),
    "refused": ("refused_requests", "Requests refused for a full queue."),
    "failed_steps": ("failed_steps", "Plans that raised."),
    "plan_hits": ("plan_cache_hits", "Steps whose plan was found."),
    "plan_misses": ("plan_cache_misses", "Steps whose plan had to be made."),
    "restarts": ("core_restarts", "Times that the core's process was started again."),
}
LABELLED = {
    "finished": ("finished_sequences", "Sequences that ended.", "reason"),
    "checked": ("checked_steps", "Steps evaluated before and after the passes.", "result"),
    "evicted": ("kv_blocks_evicted", "KV blocks that left the prefix cache.", "reason"),
}
GAINS = "gains", ("pass_gain_seconds", "Median seconds saved a step, or by guesses a token.", "decision")
TIMES = {
    "ttft": ("time_to_first_token_seconds", "From submission to the first token."),
    "itl": ("inter_token_latency_seconds", "Between two tokens of a sequence."),
    "tpot": ("time_per_output_token_seconds", "Of finished sequences: mean time per token after the first."),
    "queue": ("queue_time_seconds", "From submission to the first turn."),
    "step": ("step_seconds", "Of one step of the engine."),
    "host": ("step_host_seconds", "Of one step, less the time in model and sampler."),
}


class _Snapshot(Collector):
    def __init__(self, stats: EngineStats, labels: Mapping[str, str]):
        self.stats, self.names, self.values = stats, list(labels), list(labels.values())

    def collect(self) -> Iterator[Metric]:
        s = self.stats
        for field, (name, text) in GAUGES.items():
            yield self._family(GaugeMetricFamily, name, text, [((), getattr(s, field))])
        for field, (name, text) in COUNTERS.items():
            yield self._family(CounterMetricFamily, name, text, [((), getattr(s, field))])
        for field, (name, text, label) in LABELLED.items():
            some = [((key,), value) for key, value in sorted(getattr(s, field).items())]
            yield self._family(CounterMetricFamily, name, text, some, label)
        field, (name, text, label) = GAINS
        gains = [((key,), value) for key, value in sorted(getattr(s, field).items())]
        yield self._family(GaugeMetricFamily, name, text, gains, label)
        remarks = [
            ((name, outcome), count)
            for name, counts in s.remarks.items()
            for outcome, count in counts.items()
        ]
        yield self._family(
            CounterMetricFamily, "pass_remarks", "What the passes said.", remarks, "pass", "outcome"
        )
        for field, (name, text) in TIMES.items():
            yield self._histogram(name, text, s.times[field])

    def _family(self, kind, name: str, text: str, some: Iterable[tuple], *more: str) -> Metric:
        family = kind(PREFIX + name, text, labels=[*self.names, *more])
        for values, number in some:
            family.add_metric([*self.values, *values], number)
        return family

    def _histogram(self, name: str, text: str, summary: Mapping) -> Metric:
        family, below, buckets = HistogramMetricFamily(PREFIX + name, text, labels=self.names), 0, []
        for bound, count in zip([*summary["bounds"], "+Inf"], summary["counts"]):
            below += count
            buckets.append((str(bound), below))
        family.add_metric(self.values, buckets, summary["sum"])
        return family


def exposition(stats: EngineStats, labels: Mapping[str, str]) -> str:
    """The snapshot as Prometheus reads it (text format 0.0.4); `labels` are put on every sample."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, labels))
    return generate_latest(registry).decode()
