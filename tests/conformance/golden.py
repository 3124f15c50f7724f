"""The emitted text of the built-in model for each vendor: decodes and prompts in one step.

`python tests/conformance/golden.py` writes the files anew; their difference is then reviewed as code is.
"""

from pathlib import Path

from sagellm import backends
from sagellm.config import EngineConfig
from sagellm.engine.planner import Planner

FOLDER = Path(__file__).parent / "golden"
TARGETS = ["ascend", "ascend:310P", "mlu", "dcu", "dcu+kernels", "xpu", "xpu+kernels"]


def path(target: str) -> Path:
    return FOLDER / f"{target.replace(':', '-')}.py.txt"


def text(target: str) -> str:
    dtype = backends.load(target).capability.dtypes[0]
    planner = Planner(EngineConfig(model="builtin", target=target, dtype=dtype))
    return planner.compiler.model(("decode", "prefill")).program.source


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for target in TARGETS:
        path(target).write_text(text(target), encoding="utf-8")
