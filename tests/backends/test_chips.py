"""What is known of chips: nothing without a source, what they refuse, and the page made from it."""

from pathlib import Path

import pytest

from sagellm.backends import chips
from sagellm.backends.chips import CAPABILITIES, Evidence, Vendor, find, vendor
from sagellm.cli import capture
from sagellm.errors import UserError

ROOT = Path(__file__).parent.parent.parent
VENDORS = [vendor(name) for name in chips.NAMES]
CHIPS = [chip for known in VENDORS for chip in known.chips]


def test_the_chips_that_the_engine_is_made_for_are_described():
    named = {(chip.vendor, chip.name) for chip in CHIPS}
    ascend = ("910B1", "910B2", "910B3", "910B4", "910C", "310P", "950PR", "950DT")
    assert named >= {("ascend", name) for name in ascend}
    assert named >= {("cambricon", "MLU370-X8"), ("cambricon", "MLU590"), ("kunlun", "P800")}
    assert named >= {("hygon", "K100_AI"), ("hygon", "BW1000"), ("hygon", "BW1100")}
    assert find("ascend", "910b") is find("ascend", "910B3") and find("ascend", "950").name == "950PR"


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_every_value_has_a_source_and_only_the_cpu_and_vendor_code_were_seen(chip):
    for what, fact in chip.facts().items():
        assert fact.source
        assert not fact.verified or chip.vendor == "cpu" or (chip.vendor, what) == ("ascend", "dtypes")


def test_small_floats_are_on_the_chips_that_have_them_and_bfloat16_is_not_on_310p():
    assert {c.name for c in CHIPS if "fp8_e4m3" in c.quantized.value} == {"950PR", "950DT", "BW1100"}
    without = {c.name for c in CHIPS if "bfloat16" not in c.dtypes.value}
    assert without == {"310P"}


@pytest.mark.parametrize(
    ("chip", "asked", "line"),
    [
        (("ascend", "310P"), ("bfloat16", 128), "dtype is 'bfloat16' for ascend 310P; accepted: float16"),
        (("kunlun", "P800"), ("float16", 72), "head size is 72 for kunlun P800; accepted: 32, 64, 80"),
        (("hygon", "BW1000"), ("float16", 264), "accepted: multiples of 8 up to 256"),
        (("ascend", "910B3"), ("float16", 128, "fp8_e4m3"), "accepted: bfloat16, float16, int8"),
        (("cambricon", "MLU590"), ("float16", 128, "int8", 64), "block_size is 64 for cambricon MLU590; accepted: 16"),
    ],
)  # fmt: skip
def test_a_chip_refuses_what_it_cannot_run_in_one_line(chip, asked, line):
    with pytest.raises(UserError) as error:
        find(*chip).check(*asked)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_chip_takes_what_it_can_run():
    find("ascend", "910B3").check("bfloat16", 128, "int8", 128)
    find("ascend", "950DT").check("float16", 64, "fp8_e4m3", 16)
    find("hygon", "BW1100").check("bfloat16", 80, "fp8_e4m3", 64)


def test_costs_come_from_published_peaks_and_are_not_made_up_where_there_are_none():
    costs = find("cambricon", "MLU370-X8").costs()
    assert costs.bytes_per_second == pytest.approx(0.7 * 614.4e9)
    assert costs.flops["float16"] == pytest.approx(0.7 * 96e12) and "assumed" in costs.source
    assert find("cambricon", "MLU590").costs() is None


TOY = "name: x\ntitle: X\ndevice: x\nnetwork: gloo\ntopology: gloo\n"


@pytest.mark.parametrize(
    "more",
    ["", "install: i\ncolour: red\n", "install: i\nchips: {a: {dtypes: {value: [int3], source: s}}}\n"],
)
def test_a_description_that_is_not_whole_is_refused_by_its_file(tmp_path, more):
    (tmp_path / "vendor.yaml").write_text(TOY + more)
    with pytest.raises(UserError, match=r"vendor\.yaml"):
        Vendor.read(tmp_path)


def test_a_capability_is_as_well_verified_as_its_best_evidence_and_else_not_checked(tmp_path):
    (tmp_path / "vendor.yaml").write_text(f"{TOY}install: i\n")
    (tmp_path / "evidence.yaml").write_text(
        "- {capability: 'numbers: qwen3', how: schema, by: a}\n"
        "- {capability: 'numbers: llama', how: host code, by: b, chips: [one]}\n"
    )
    toy = Vendor.read(tmp_path)
    assert toy.verified("one", "numbers") == "host code" and toy.verified("two", "numbers") == "schema"
    assert toy.verified("one", "speed") == "none"


def test_evidence_of_an_unknown_kind_is_refused():
    for given in ({"capability": "beauty", "how": "schema"}, {"capability": "speed", "how": "hearsay"}):
        with pytest.raises(UserError, match="accepted: "):
            Evidence(by="x", **given)


@pytest.mark.parametrize("known", VENDORS, ids=lambda v: v.name)
def test_evidence_is_of_chips_that_are_described_and_shown_by_a_file(known):
    for evidence in known.evidence:
        assert set(evidence.chips) <= {chip.name for chip in known.chips}
        assert (ROOT / evidence.by.partition("::")[0]).exists(), evidence.by
        assert evidence.how != "silicon" or known.name == "cpu"  # until somebody runs it there


def test_the_page_is_what_the_command_prints():
    printed = capture(["devices", "--hardware-table"])
    assert printed.code == 0
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert page == printed.stdout, "sagellm devices --hardware-table > docs/hardware.md"
    assert all(capability in page for capability in CAPABILITIES)
    assert "| CPU | x86-64 | silicon |" in page and "| CPU | aarch64 | none |" in page


def test_the_chips_are_printed_with_their_sources_and_as_json():
    text = capture(["devices", "--chips"]).stdout
    assert "hygon BW1100" in text and "vllm-plugin-das" in text and "only read" in text
    assert '"name": "910B3"' in capture(["devices", "--chips", "--json"]).stdout
    refused = capture(["devices", "--chips", "--hardware-table"])
    assert refused.code == 2 and "accepted: one of them" in refused.stderr
