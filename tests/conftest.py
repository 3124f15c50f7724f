"""Runs the FileCheck tests too, and puts tests/ on the path, where strategies.py and checkpoints.py lie."""

import os

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["sagellm.testing.plugin"]

# Two cores are shared by all that runs here and by what it starts, and threads that wait for each other spin.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Always the same examples, however slow the machine is just now; `make test-long` draws others each time.
settings.register_profile(
    "steady",
    deadline=None,
    derandomize="SAGELLM_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("steady")


def pytest_ignore_collect(collection_path, config):
    """`-m contract` imports no module that has no such test: most of its time would go there."""
    if config.option.markexpr == "contract" and collection_path.is_file():
        return True if "mark.contract" not in collection_path.read_text("utf-8") else None
    return None
