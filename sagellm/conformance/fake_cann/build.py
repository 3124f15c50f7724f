"""Build the fake CANN for the torch_npu that fits the installed torch: fetch its wheel, derive what it wants, compile.

All is kept in the user's cache folder. The wheel stays outside site-packages, as torch loads an installed one by
itself.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch

from sagellm.errors import UserError

RUNTIME = re.compile(
    r"^(aclrt|aclmdl|aclop|aclsys|aclprof|aclsk|aclGet|aclSet|aclCreate|aclDestroy|aclStress|aclQuery|aclGen|aclProf"
    r"|Hccl[A-Z]|rt[A-Z][a-z])"
)
"""Functions that torch_npu looks up by name."""
KERNEL = re.compile(r"^(aclnn[A-Z]|aclFft|aclRfft|aclStft|aclSp|aclRan)")
MAIN = "libascendcl.so"
LOOKED_UP = ("libopapi.so", "libnnopbase.so", "libruntime.so")
"""Libraries that torch_npu opens by name."""


class Unavailable(UserError):
    """The vendor's host code cannot run here; the reason in one line."""


def folder() -> Path:
    """Where it is kept, by the versions it is for."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "sagellm" / "fake_cann" / f"torch_npu-{version()}"


def version() -> str:
    return torch.__version__.partition("+")[0]


def build() -> tuple[Path, Path]:
    """The unpacked wheel and the folder of the stand-ins' libraries. Raises `Unavailable`."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable(
            f"the fake CANN is for Linux on x86_64, this is {platform.system()} {platform.machine()}"
        )
    key = hashlib.sha256(Path(__file__).read_bytes() + _own().encode()).hexdigest()[:16]
    libraries = folder() / f"cann-{key}"
    with _alone(folder()):
        wheel = _wheel(folder())
        if not (libraries / "done").exists():
            _compile(libraries, _source(wheel / "torch_npu"), wheel / "torch_npu")
    return wheel, libraries


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time builds there; the others wait, and find what it made."""
    import fcntl  # where there is a fake CANN, there is this

    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _own() -> str:
    return files(__package__).joinpath("cann.c").read_text(encoding="utf-8")


def _wheel(root: Path) -> Path:
    unpacked = root / "wheel"
    if not (unpacked / "torch_npu").is_dir():
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
            done = subprocess.run(
                [*command, f"torch_npu=={version()}"], capture_output=True, text=True, check=False
            )
            found = list(Path(scratch).glob("torch_npu-*.whl"))
            if not found:
                said = (done.stderr.strip().splitlines() or ["pip found none"])[-1]
                raise Unavailable(f"no wheel of torch_npu {version()}: {said}")
            with zipfile.ZipFile(found[0]) as archive:
                archive.extractall(Path(scratch) / "wheel")
            (Path(scratch) / "wheel").rename(unpacked)
    return unpacked


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"the fake CANN wants {error.filename}, which is not installed") from error
    if done.returncode:
        raise Unavailable(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    return done.stdout


def _symbols(library: Path, which: str) -> set[str]:
    lines = (line.split() for line in _run("nm", "-D", which, library).splitlines())
    wanted = "U" if which == "--undefined-only" else None
    return {w[-1].partition("@")[0] for w in lines if len(w) >= 2 and wanted in (None, w[-2])}


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-d", library))


def _system(name: str) -> Path | None:
    places = (
        "/lib/x86_64-linux-gnu",
        "/usr/lib/x86_64-linux-gnu",
        "/lib64",
        "/usr/lib64",
        "/lib",
        "/usr/lib",
    )
    return next((Path(p) / name for p in places if (Path(p) / name).exists()), None)


def _vendor(package: Path) -> list[Path]:
    return [*sorted((package / "lib").glob("*.so")), *sorted(package.glob("_C*.so"))]


def _torch() -> list[Path]:
    return [p for p in (Path(torch.__file__).parent / "lib").iterdir() if ".so" in p.name]


def _missing(package: Path) -> list[str]:
    """Libraries that torch_npu is linked to and that are nowhere."""
    have = {p.name for p in (*_vendor(package), *_torch())}
    wanted = dict.fromkeys(name for library in _vendor(package) for name in _needed(library))
    return [name for name in wanted if name not in have and _system(name) is None]


def _source(package: Path) -> str:
    """cann.c and what is missing beyond it."""
    own = _own()
    vendor, provided, wanted = _vendor(package), set(), set()
    names = {name for library in vendor for name in _needed(library)}
    for library in (*vendor, *_torch(), *filter(None, map(_system, sorted(names)))):
        provided |= _symbols(library, "--defined-only")
    for library in vendor:
        wanted |= _symbols(library, "--undefined-only")
    wanted = {s for s in wanted - provided if not s.startswith(("Py", "_Py"))}
    words = set()
    for library in vendor:
        found = re.findall(rb"(?<![A-Za-z0-9_])[A-Za-z_][A-Za-z0-9_]{4,79}(?=\x00)", library.read_bytes())
        words |= {w.decode() for w in found}
    have = set(
        re.findall(r"^(?:Error|void \*|size_t|const char \*)\s*\*?([A-Za-z0-9_]+)\(", own, re.MULTILINE)
    )
    kernels = {w.removesuffix("GetWorkspaceSize") for w in words if KERNEL.match(w)} - have
    plain = {s for s in wanted if not s.startswith("_Z")} | {w for w in words if RUNTIME.match(w)}
    lines = []
    for name in sorted(plain - have - kernels - {f"{k}GetWorkspaceSize" for k in kernels}):
        lines.append(f"OTHER{'_NOTED' if name.startswith('Hccl') else ''}({name})")
    for number, symbol in enumerate(sorted(s for s in wanted if s.startswith("_Z"))):
        if made := re.search(r"CreateOperationINS_5infer\d+([A-Za-z]+)Param", symbol):
            lines.append(f'ATB_OPERATION({number}, "{symbol}", "atb::{made[1]}")')
        else:
            kind = "CONTEXT" if "CreateContext" in symbol else "OTHER"
            lines.append(f'ATB_{kind}({number}, "{symbol}")')
    lines += [f"KERNEL({name})" for name in sorted(kernels)]
    return own + "\n".join(lines) + "\n"


def _compile(libraries: Path, source: str, package: Path) -> None:
    libraries.mkdir(parents=True, exist_ok=True)
    (libraries / "cann.c").write_text(source, encoding="utf-8")
    (libraries / "empty.c").write_text("", encoding="utf-8")
    shared = ("gcc", "-O0", "-shared", "-fPIC", "-w")
    _run(*shared, f"-Wl,-soname,{MAIN}", "-o", libraries / MAIN, libraries / "cann.c", "-lpthread")
    for name in (*_missing(package), *LOOKED_UP):
        if name != MAIN:
            link = ("-Wl,--no-as-needed", f"-Wl,-soname,{name}", f"-L{libraries}")
            _run(*shared, *link, "-o", libraries / name, libraries / "empty.c", f"-l:{MAIN}")
    (libraries / "done").touch()
