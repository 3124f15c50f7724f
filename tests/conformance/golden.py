"""The emitted text of the built-in model for each vendor: decodes and prompts in one step.

`python tests/conformance/golden.py` writes the files anew; their difference is then reviewed as code is.
"""

from collections.abc import Iterator
from pathlib import Path

from sagellm import backends
from sagellm.batch import Stage
from sagellm.config import EngineConfig
from sagellm.engine.planner import Planner
from sagellm.ir.lower import stage_words

FOLDER = Path(__file__).parent / "golden"
TARGETS = ["ascend", "ascend:310P", "mlu", "dcu", "dcu+kernels", "xpu", "xpu+kernels", "cuda"]
FILTERS = Stage.DRAW | Stage.TOP_K | Stage.TOP_P


def path(target: str, what: str = "") -> Path:
    return FOLDER / f"{target.replace(':', '-')}{what}.py.txt"


def planner(target: str, ranks: int = 1) -> Planner:
    dtype = backends.load(target).capability.dtypes[0]
    return Planner(EngineConfig(model="builtin", target=target, dtype=dtype, tensor_parallel=ranks))


def text(target: str) -> str:
    return planner(target).compiler.model(("decode", "prefill")).program.source


def texts() -> Iterator[tuple[Path, str]]:
    """Each file, and what is emitted now."""
    for target in TARGETS:
        yield path(target), text(target)
    yield (
        path("ascend", "-2-ranks"),
        planner("ascend", 2).compiler.model(("decode", "prefill"), 64).program.source,
    )
    yield path("ascend", "-sampler"), planner("ascend").compiler.sampler(stage_words(FILTERS)).source


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, emitted in texts():
        file.write_text(emitted, encoding="utf-8")
