"""Runs the FileCheck tests too, and puts tests/ on the path, where strategies.py and checkpoints.py lie."""

import torch

pytest_plugins = ["sagellm.testing.plugin"]

torch.set_num_threads(1)  # two cores are shared by everything that runs here
