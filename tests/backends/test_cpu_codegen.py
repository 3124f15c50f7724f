"""Every operation of the model graph and of the weights program has code on the CPU, or its parts have."""

from sagellm.backends.cpu.codegen import KERNELS, LOADS
from sagellm.ir.dialects import COMM, NN, WEIGHTS

CONTROL = {"nn.func", "nn.return", "nn.call", "nn.repeat", "weights.load", "weights.store"}
JOINED = {"comm.linear_all_reduce", "nn.top_k_top_p"}
"""What passes make of several operations only where the backend has one call for them."""


def test_every_operation_has_a_kernel():
    names = {op.name for dialect in (NN, COMM, WEIGHTS) for op in dialect.operations} - CONTROL - JOINED
    assert names == set(KERNELS) | set(LOADS)


def test_no_kernel_for_an_operation_that_does_not_exist():
    known = {op.name for dialect in (NN, COMM, WEIGHTS) for op in dialect.operations}
    assert set(KERNELS) | set(LOADS) <= known
