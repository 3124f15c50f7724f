"""Puts tests/ on the path, where strategies.py lies; one torch thread, since the models are tiny."""

import torch

torch.set_num_threads(1)
