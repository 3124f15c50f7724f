"""Captured decodes say what the same steps say uncaptured: nothing of the step that was captured stays in a graph."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sagellm.backends.aten.graphs import CapturedDecodes, HeldRows
from sagellm.backends.cuda import CudaBackend
from sagellm.conformance import scenario
from sagellm.conformance.models import write_model


class Recorded(TorchDispatchMode):
    """A graph in the place of CUDA's: the operators of the capture run again over the tensors that they ran over."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    def replay(self):
        Recorded.replays += 1
        for operator, args, kwargs, out in self.calls:
            for before, now in zip(pytree.tree_leaves(out), pytree.tree_leaves(operator(*args, **kwargs))):
                before.copy_(now)


@contextmanager
def capture(graph, pool):
    with graph:
        yield


GRAPHS = SimpleNamespace(
    CUDAGraph=Recorded, graph=capture, synchronize=lambda: None, graph_pool_handle=lambda: "pool"
)


@pytest.mark.parametrize("family", ["qwen3", "mistral-window"])
def test_a_replayed_graph_gives_the_logits_of_the_step_it_is_replayed_for(monkeypatch, tmp_path, family):
    folder = write_model(tmp_path / family, family)
    monkeypatch.setattr(CudaBackend, "device", "cpu")
    plain = scenario.run("cuda", folder, "float32", block_size=16)

    def captured(self, function, kinds):
        if kinds != ("decode",):
            return function
        return CapturedDecodes(function, GRAPHS, lambda step, like: HeldRows(step, like.block_size, "cpu"))

    monkeypatch.setattr(CudaBackend, "captured", captured)
    monkeypatch.setattr(Recorded, "replays", 0)
    replayed = scenario.run("cuda", folder, "float32", block_size=16)
    assert Recorded.replays > 20
    assert replayed.tokens == plain.tokens
    most, _, _ = scenario.worst(plain, replayed)
    assert most <= 1e-5 * max(float(logits.abs().max()) for logits in plain.logits.values())
