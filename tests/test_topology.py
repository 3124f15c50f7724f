"""What collectives take, by the alpha-beta model."""

import pytest
from attrs import evolve

from sagellm.backends.chips import NAMES, vendor
from sagellm.config import EngineConfig
from sagellm.errors import UserError
from sagellm.topology import PHASES, TOPOLOGIES, find

MIB = 2**20


def joined(wiring, latency=1e-5, bandwidth=1e9):
    known = TOPOLOGIES["hccs"]
    return evolve(
        known,
        wiring=wiring,
        latency=evolve(known.latency, value=latency),
        bandwidth=evolve(known.bandwidth, value=bandwidth),
    )


def test_a_ring_moves_2_n_minus_1_over_n_of_the_bytes_and_a_mesh_two_parts_at_once():
    assert joined("ring", latency=0).seconds("all_reduce", MIB, 4) == pytest.approx(2 * 3 / 4 * MIB / 1e9)
    assert joined("mesh", latency=0).seconds("all_reduce", MIB, 4) == pytest.approx(2 / 4 * MIB / 1e9)
    assert joined("ring").seconds("all_reduce", 0, 4) == pytest.approx(2 * 3 * 1e-5)
    assert joined("mesh").seconds("all_reduce", 0, 4) == pytest.approx(2e-5)
    assert joined("ring").seconds("send", MIB, 8) == pytest.approx(1e-5 + MIB / 1e9)


@pytest.mark.parametrize("wiring", ["ring", "mesh"])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_of_the_parts(wiring):
    topology = joined(wiring)
    parts = topology.seconds("reduce_scatter", MIB, 8) + topology.seconds("all_gather", MIB / 8, 8)
    assert topology.seconds("all_reduce", MIB, 8) == pytest.approx(parts)


def test_one_rank_has_nobody_to_talk_to_and_two_are_a_mesh_and_a_ring():
    for kind in PHASES:
        assert joined("ring").seconds(kind, MIB, 1) == 0
        assert joined("ring").seconds(kind, MIB, 2) == joined("mesh").seconds(kind, MIB, 2) > 0


def test_every_figure_has_a_source_and_only_measured_ones_are_verified():
    for topology in TOPOLOGIES.values():
        for figure in (topology.bandwidth, topology.latency, topology.slowdown):
            if figure is not None:
                assert figure.source
                assert not figure.verified or "sagellm bench" in figure.source


def test_every_vendors_devices_are_joined_somehow():
    assert {vendor(name).topology for name in NAMES} | {"pcie", "roce"} == {*TOPOLOGIES}


def test_an_unknown_topology_is_named():
    with pytest.raises(UserError, match="unknown topology 'mars'; accepted: gloo, hccs, pcie"):
        find("mars")


def test_a_link_without_a_published_number_wants_one_of_an_operator():
    line = "topology 'mlu-link' has no published bandwidth; accepted: mlu-link@N"
    with pytest.raises(UserError, match=line):
        find("mlu-link")
    with pytest.raises(UserError, match=line):
        TOPOLOGIES["mlu-link"].seconds("all_reduce", MIB, 2)
    assert TOPOLOGIES["mlu-link"].seconds("all_reduce", MIB, 1) == 0
    given = find("mlu-link@200")
    assert (given.bandwidth.value, given.bandwidth.verified) == (2e11, False)
    assert "mlu-link@200: ring, 200 GB/s a link" in str(given)


def test_an_operator_may_know_better():
    assert find("hccs@56").seconds("all_gather", MIB, 2) < find("hccs").seconds("all_gather", MIB, 2)
    assert EngineConfig(topology="hccs@56").topology == "hccs@56"
    for wrong in ("hccs@", "hccs@fast", "hccs@0", "hccs@-1", "hccs@inf", "hccs@nan"):
        with pytest.raises(UserError, match=f"topology is '{wrong}'; accepted: behind the @ a number"):
            EngineConfig(topology=wrong)
    for unknown in ("auto@5", "mars@5"):
        with pytest.raises(UserError, match="unknown topology"):
            EngineConfig(topology=unknown)
