"""How the ranks' devices are joined, and what a collective takes between them. A leaf: figures with their sources.

A message of m bytes over one link takes latency + m / bandwidth (the alpha-beta model). Collectives are those of
Thakur, Rabenseifner and Gropp 2005: an all-reduce is a reduce-scatter and an all-gather; N ranks do each in N - 1
rounds where they form a ring, and in one where every two of them have a link.
"""

from __future__ import annotations

import math

from attrs import evolve, field, frozen

from sagellm import checks
from sagellm.errors import UserError, unknown
from sagellm.target import CostModel, Figure

WIRINGS = ("mesh", "ring")

PHASES = {"all_reduce": 2, "reduce_scatter": 1, "all_to_all": 1, "all_gather": 1, "send": 1, "recv": 1}
"""How many times the ranks exchange parts."""


@frozen(kw_only=True)
class Topology:
    """Equal links between equal devices."""

    name: str = field(validator=checks.text)
    wiring: str = field(validator=checks.one_of(WIRINGS))
    """mesh: a link between every two; ring: all share one path, or pass on to a neighbour."""
    bandwidth: Figure | None
    """Bytes a second of one link, each way. None: no number is published, so that an operator must give one."""
    latency: Figure
    """Seconds until a message that has no bytes is there."""
    slowdown: Figure
    """How many times longer computing takes while a collective is under way."""
    costs: CostModel | None = None
    """Of the devices; None: those of the backend."""
    one_device: bool = field(default=False, validator=checks.flag)
    """The ranks share one device; each has its part of it."""

    def seconds(self, collective: str, size: float, ranks: int) -> float:
        """Of a collective (a key of PHASES) to which each of `ranks` brings a tensor of `size` bytes."""
        if ranks < 2:
            return 0.0
        whole = collective in ("all_gather", "send", "recv")
        one_round = self.latency.value + (size if whole else size / ranks) / self._known().value
        rounds = 1 if self.wiring == "mesh" or collective in ("send", "recv") else ranks - 1
        return PHASES[collective] * rounds * one_round

    def _known(self) -> Figure:
        if self.bandwidth is None:
            raise UserError(
                f"topology {self.name!r} has no published bandwidth; accepted: {self.name}@N, where one link "
                "carries N GB/s each way"
            )
        return self.bandwidth

    def __str__(self) -> str:
        link = "no known rate of" if self.bandwidth is None else f"{self.bandwidth.value / 1e9:.3g} GB/s"
        return (
            f"{self.name}: {self.wiring}, {link} a link, "
            f"latency {self.latency.value * 1e6:.3g} us, computing takes {self.slowdown.value:.3g} times as long "
            "beside it"
        )


def _figure(value: float, unit: str, source: str, verified: bool = False) -> Figure:
    return Figure(value=value, unit=unit, source=source, verified=verified)


ASSUMED = "assumed; not measured"

TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology(
            name="gloo",
            wiring="ring",
            bandwidth=_figure(7e8, "B/s", "sagellm bench collectives, 2 cores of a Zen 3 server", True),
            latency=_figure(2.5e-4, "s", "sagellm bench collectives, 2 cores of a Zen 3 server", True),
            slowdown=_figure(2.0, "times", "assumed: gloo copies and sums on the cores that compute"),
            one_device=True,
        ),
        Topology(
            name="hccs",
            wiring="mesh",
            bandwidth=_figure(
                2.8e10,
                "B/s",
                "published, not confirmed: Atlas 800T A2, 392 GB/s a processor, 7 links, both ways",
            ),
            latency=_figure(1e-5, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
            costs=CostModel(
                flops={"float32": 5e13, "bfloat16": 2e14, "float16": 2e14},
                bytes_per_second=1.1e12,
                call=5e-6,
                source="Ascend 910B-like: 280 TFLOP/s of fp16 (ai.gitee.com), 1.6 TB/s (unconfirmed), 70% assumed",
            ),
        ),
        Topology(
            name="pcie",
            wiring="ring",
            bandwidth=_figure(
                2.0e10, "B/s", "PCIe 4.0 x16: 31.5 GB/s each way by its standard, of which 20 assumed"
            ),
            latency=_figure(1.5e-5, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
            costs=CostModel(
                flops={"float32": 1e14, "bfloat16": 2.2e14, "float16": 2.2e14},
                bytes_per_second=1.3e12,
                call=5e-6,
                source="A100-like: 312 TFLOP/s of bf16, 1.94 TB/s by its data sheet; 70% of both assumed",
            ),
        ),
        Topology(
            name="nvlink",
            wiring="ring",
            bandwidth=_figure(4.5e11, "B/s", "NVIDIA's data sheet of H100 SXM: 900 GB/s, both ways"),
            latency=_figure(5e-6, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
            costs=CostModel(
                flops={"float32": 4.7e13, "bfloat16": 6.9e14, "float16": 6.9e14},
                bytes_per_second=2.3e12,
                call=5e-6,
                source="H100-like: 989 TFLOP/s of bf16, 3.35 TB/s by its data sheet; 70% of both assumed",
            ),
        ),
        Topology(
            name="xgmi",
            wiring="ring",
            bandwidth=_figure(
                9.2e10, "B/s", "an analyst's, of Hygon Y100: 184 GB/s, taken as both ways; not confirmed"
            ),
            latency=_figure(1e-5, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
        ),
        Topology(
            name="xpu-link",
            wiring="ring",
            bandwidth=_figure(
                2e11, "B/s", "a community table, of Kunlun P800: about 400 GB/s, taken as both ways"
            ),
            latency=_figure(1e-5, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
        ),
        Topology(
            name="mlu-link",
            wiring="ring",
            bandwidth=None,
            latency=_figure(1e-5, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
        ),
        Topology(
            name="roce",
            wiring="ring",
            bandwidth=_figure(2.5e10, "B/s", "Ethernet of 200 Gbit/s by its standard; less is reached"),
            latency=_figure(2e-5, "s", ASSUMED),
            slowdown=_figure(1.1, "times", ASSUMED),
        ),
    )
}


def find(text: str) -> Topology:
    """By its name, or as `name@200`: its links carry 200 GB/s each way, as an operator knows better."""
    name, at, rate = text.partition("@")
    if name not in TOPOLOGIES:
        raise unknown("topology", name, TOPOLOGIES)
    topology = TOPOLOGIES[name]
    if at:
        topology = evolve(topology, name=text, bandwidth=_figure(_rate(text, rate), "B/s", "an operator's"))
    topology._known()
    return topology


def _rate(text: str, rate: str) -> float:
    try:
        value = float(rate) * 1e9
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"topology is {text!r}; accepted: behind the @ a number of GB/s, more than 0")
    return value
