"""Whose devices are here: by plug-ins and builds, told apart behind one device string, without ever raising.

The vendors' modules are stand-ins that answer as their documents say.
"""

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sagellm import backends
from sagellm.backends import devices
from sagellm.backends.base import require_device
from sagellm.backends.chips import Vendor, vendor
from sagellm.backends.null import NullBackend
from sagellm.cli import capture
from sagellm.config import EngineConfig
from sagellm.engine.planner import Planner
from sagellm.errors import UserError

GIB = 2**30


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine that has no device and no plug-in."""
    monkeypatch.setattr(devices, "DEV", tmp_path)
    for known in devices.vendors():
        for name in known.visible:
            monkeypatch.delenv(name, raising=False)
        for package in known.plugins:
            monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def has(monkeypatch):
    """`has("torch_npu", npu=driver(...))`: this package, and this module of torch."""

    def install(package=None, **modules):
        if package:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        for name, module in modules.items():
            monkeypatch.setattr(torch, name, module, raising=False)

    return install


def driver(*names, capability=None, **more):
    """torch.npu, torch.mlu or torch.cuda of a machine with these devices, 64 GiB each."""
    properties = {key: more.pop(key) for key in ("gcnArchName", "isa_version") if key in more}
    return SimpleNamespace(
        is_available=lambda: bool(names),
        device_count=lambda: len(names),
        get_device_capability=lambda index=0: capability,
        get_device_properties=lambda i: SimpleNamespace(name=names[i], total_memory=64 * GIB, **properties),
        **{name: (lambda *_, value=value: value) for name, value in more.items()},
    )


def found_on(vendor_name):
    return devices.probe(vendor(vendor_name))


def those_found():
    return [v.name for v in devices.vendors() if devices.probe(v).found]


@pytest.mark.parametrize(
    ("soc", "name", "chip"),
    [
        (202, "Ascend310P3", "310P"),
        (220, "Ascend910B1", "910B1"),
        (221, "Ascend910B2", "910B2"),
        (223, "Ascend910B3", "910B3"),
        (225, "Ascend910B4-1", "910B4"),
        (250, "Ascend910_9391", "910C"),
        (255, "Ascend910_9362", "910C"),
        (260, "Ascend950PR_9599", "950PR"),
        (260, "Ascend950DT_9589", "950DT"),
        (999, "Ascend2050", None),
    ],
)
def test_ascend_chips_are_told_apart_and_may_have_no_capability(has, soc, name, chip):
    has("torch_npu", npu=driver(name, name, capability=None, get_soc_version=soc))
    first, second = found_on("ascend").devices
    assert (first.index, first.name, first.ids, first.memory) == (0, name, (str(soc),), 64 * GIB)
    assert second.index == 1 and (first.chip and first.chip.name) == chip
    assert those_found() == ["ascend", "cpu"]


@pytest.mark.parametrize(("name", "chip"), [("MLU590-M9", "MLU590"), ("MLU370-X8", "MLU370-X8")])
def test_cambricon_is_not_nvidia_though_its_alias_of_torch_cuda_answers_so(has, name, chip):
    has("torch_mlu", mlu=driver(name, isa_version=592), cuda=driver(name, capability=(5, 0)))
    (device,) = found_on("cambricon").devices
    assert device.chip.name == chip and device.ids == ("592",)
    assert those_found() == ["cambricon", "cpu"]


@pytest.mark.parametrize(
    ("name", "arch", "chip"),
    [
        ("K100_AI", "gfx928:sramecc+:xnack-", "K100_AI"),
        ("K100_AI", "gfx936", "K100_AI"),
        ("BW1000_H", "gfx936", "BW1000"),
        ("", "gfx936", "BW1000"),
        ("BW1100", "gfx938", "BW1100"),
    ],
)
def test_hygon_is_a_hip_build_with_its_own_architectures(has, monkeypatch, name, arch, chip):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    has(cuda=driver(name, gcnArchName=arch, capability=(9, 3)))
    assert found_on("hygon").devices[0].chip.name == chip
    assert those_found() == ["hygon", "cpu"]


def test_an_amd_device_is_not_hygons(has, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    has(cuda=driver("AMD Instinct MI300X", gcnArchName="gfx942"))
    assert those_found() == ["cpu"]
    assert "another vendor's (AMD Instinct MI300X, gfx942)" in found_on("hygon").why_none


@pytest.mark.parametrize("build", [{"cuda": "12.8"}, {"hip": "6.3"}, {}])
def test_with_torch_xmlir_the_string_cuda_means_kunlun_whatever_torch_says(has, monkeypatch, build):
    for name, version in build.items():
        monkeypatch.setattr(torch.version, name, version)
    has("torch_xmlir", cuda=driver("P800 OAM", gcnArchName="gfx936", capability=(8, 6)))
    assert found_on("kunlun").devices[0].chip.name == "P800"
    assert those_found() == ["kunlun", "cpu"]
    assert "is Kunlun XPU here" in found_on("cuda").why_none


@pytest.mark.parametrize("capability", [None, (5, 0), (8, 6), (9, 0)])
def test_a_cuda_build_is_nvidias_whatever_the_capability(has, monkeypatch, capability):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    has(cuda=driver("NVIDIA H100 80GB HBM3", capability=capability))
    assert those_found() == ["cuda", "cpu"]
    assert found_on("cuda").devices[0].chip is None


def test_a_missing_plug_in_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    (tmp_path / "davinci0").touch()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    probe = found_on("ascend")
    assert not probe.found and probe.missing == "torch_npu"
    looked = {look.what: look for look in probe.looked}
    assert looked[f"{tmp_path}/davinci[0-9]*"].detail == "davinci0"
    assert looked["variable ASCEND_RT_VISIBLE_DEVICES"].detail == "0,1"
    assert not looked["package torch_npu"].found
    refusal = str(probe.refusal())
    assert (
        "torch_npu is not installed; install: pip install 'sagellm[ascend]'" in refusal
        and "\n" not in refusal
    )


def fails(error):
    def call(*_):
        raise error

    return call


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (
            {"is_available": fails(RuntimeError("no driver\nhint"))},
            "is_available() fails: RuntimeError: no driver",
        ),
        ({"device_count": fails(SystemExit(3))}, "device_count() fails: SystemExit: 3"),
        ({"is_available": lambda: False}, "sees no device (ASCEND_RT_VISIBLE_DEVICES=)"),
        ({"device_count": lambda: None}, "looking for devices fails: TypeError"),
    ],
)
def test_a_probe_never_raises(has, monkeypatch, broken, why):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    has("torch_npu", npu=SimpleNamespace(**vars(driver("Ascend910B3")) | broken))
    assert why in found_on("ascend").why_none


def test_a_device_that_says_little_is_still_found(has):
    silent = {name: fails(RuntimeError("busy")) for name in ("get_device_properties", "get_soc_version")}
    has("torch_npu", npu=SimpleNamespace(**vars(driver("Ascend910B3")) | silent))
    (device,) = found_on("ascend").devices
    assert (device.name, device.ids, device.memory, device.chip) == ("unnamed", (), None, None)


def test_a_plug_in_that_cannot_be_imported_is_the_reason(monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so: cannot open')")
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.syspath_prepend(tmp_path)
    assert found_on("ascend").why_none == (
        "package torch_npu cannot be imported: ImportError: libascendcl.so: cannot open"
    )


def test_nothing_of_a_vendor_is_imported_before_its_devices_are_asked_for(tmp_path):
    """Nor is torch, to read what is known of chips."""
    for package in ("torch_npu", "torch_mlu", "torch_xmlir"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    code = """
import sys
from sagellm.backends import chips
chips.find("ascend", "910B")
assert "torch" not in sys.modules
from sagellm import backends
assert backends.load("cpu").available and backends.load("cpu").capability
assert not {"torch_npu", "torch_mlu", "torch_xmlir"} & {*sys.modules}
from sagellm.backends import devices
why = {v.name: devices.probe(v).why_none for v in devices.vendors()}
assert "cannot be imported: SystemExit: imported" in why["ascend"], why
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


class ForAscend(NullBackend):
    """A backend whose programs need an Ascend chip."""

    name = "ascend"
    device = "npu"

    def __init__(self, chip="310P"):
        self.chip = chip

    @property
    def available(self):
        return super(NullBackend, self).available

    @property
    def capability(self):
        from attrs import evolve

        return evolve(super().capability, backend=self.name, device=self.device)


@pytest.fixture
def ascend(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "ascend", f"{__name__}:ForAscend")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[ForAscend.__module__])
    return ForAscend


def test_auto_takes_an_accelerator_before_the_cpu(ascend, has):
    assert backends.best() == "cpu"
    for name, chip in (("Ascend310P3", "310P"), ("Ascend910B4", "910B"), ("Ascend950DT_9589", "950")):
        has("torch_npu", npu=driver(name, get_soc_version=0))
        assert backends.best() == f"ascend:{chip}"
        require_device(backends.load("auto"))
    has("torch_npu", npu=driver("Ascend2050", get_soc_version=0))
    assert backends.best() == "ascend"


def test_the_chip_of_a_target_is_one_that_is_described():
    for chip in ("910B", "910C", "310P", "950"):
        assert backends.load(f"ascend:{chip}").silicon.kind == chip


def test_a_program_for_another_chip_than_is_here_is_refused(ascend, has):
    has("torch_npu", npu=driver("Ascend910B2", get_soc_version=221))
    line = refused("--device", "ascend")
    assert "'ascend' is Ascend910B2 here, and the target ascend 310P; accepted: ascend:910B" in line


def refused(*args):
    done = capture(["run", "-m", "builtin", *args, "hello"])
    assert done.code == 2 and len(done.stderr.strip().splitlines()) == 1, done
    return done.stderr


def test_a_device_without_its_plug_in_is_refused_before_anything_is_loaded(ascend, monkeypatch):
    monkeypatch.setattr("sagellm.engine.planner.resolve", fails(AssertionError("the model was looked for")))
    line = refused("--device", "ascend")
    assert "package torch_npu is not installed; install: pip install 'sagellm[ascend]'" in line


def test_a_model_that_the_chip_cannot_run_is_refused_before_its_weights_are_loaded(ascend, has, monkeypatch):
    has("torch_npu", npu=driver("Ascend310P3", get_soc_version=202))
    monkeypatch.setattr("sagellm.engine.core.load_weights", fails(AssertionError("weights were loaded")))
    line = refused("--device", "ascend", "--dtype", "bfloat16", "--block-size", "128")
    assert "dtype is 'bfloat16' for ascend 310P; accepted: float16" in line
    line = refused("--device", "ascend", "--dtype", "float16", "--block-size", "100")
    assert "block_size is 100 for ascend 310P; accepted: multiples of 32 up to 1024" in line


def test_the_kv_cache_goes_into_the_memory_of_the_device(ascend, has):
    """Of one that is here, what is free; to compile for one that is not, what the chip has; else the host's."""
    config = EngineConfig(target="ascend", dtype="float16", block_size=128, kv_memory_fraction=0.5)
    has("torch_npu", npu=driver("Ascend310P3", get_soc_version=202, mem_get_info=(64 * 2**20, 64 * GIB)))
    planner = Planner(config)
    weights = 2 * planner.parameters
    held = (len(planner.kv.pool.references) - 1) * planner.rank_schema.bytes_per_block
    assert 0.9 < held / (0.5 * (64 * 2**20 - weights)) <= 1
    assert ForAscend("310P").free_memory == 64 * 2**20
    has("torch_npu", npu=driver())
    assert ForAscend("910B").free_memory == 64e9 and ForAscend("310P").free_memory is None


def test_a_vendor_from_elsewhere_is_looked_for_too(monkeypatch, tmp_path, has):
    """Its backend says how; a description that it lacks is nobody's error."""
    text = "name: toy\ntitle: Toy\ndevice: toy\nplugins: [torch_toy]\ninstall: i\nnetwork: gloo\ntopology: pcie\n"
    (tmp_path / "vendor.yaml").write_text(text)
    toy = SimpleNamespace(vendor=Vendor.read(tmp_path))
    monkeypatch.setattr(backends, "names", lambda: ["cpu", "null", "toy", "strange"])
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: {"toy": toy}.get(name) or load(name))
    assert [v.name for v in devices.vendors()][-1] == "toy"
    has("torch_toy", toy=driver("Toy 1"))
    assert those_found() == ["cpu", "toy"]


def test_a_vendor_that_has_no_code_generator_yet_is_told_so(monkeypatch):
    monkeypatch.delitem(backends.BACKENDS, "kunlun", raising=False)
    assert "no code generator for Kunlun XPU; accepted: auto, ascend, cambricon, cpu" in refused(
        "--device", "kunlun"
    )


def test_the_command_says_what_was_found_and_why_the_rest_was_not():
    text = capture(["devices"])
    assert text.code == 0
    assert "none      package torch_npu is not installed" in text.stdout
    assert "install   pip install 'sagellm[ascend]'" in text.stdout and "auto is cpu" in text.stdout
    with pytest.raises(UserError, match="torch_mlu is not installed; install: pip install torch_mlu"):
        raise found_on("cambricon").refusal()
