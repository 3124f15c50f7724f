"""The dialects: `batch`, `kv` and `spec` for the batch graph, `nn` and `comm` for the model graph, `weights`."""

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin

from sagellm.ir.dialects.batch import BATCH
from sagellm.ir.dialects.comm import COMM
from sagellm.ir.dialects.kv import KV
from sagellm.ir.dialects.nn import NN
from sagellm.ir.dialects.spec import SPEC
from sagellm.ir.dialects.weights import WEIGHTS

DIALECTS = (BATCH, KV, SPEC, NN, COMM, WEIGHTS)


def context() -> Context:
    """An xDSL context that knows our dialects and no others."""
    ctx = Context()
    for dialect in (Builtin, *DIALECTS):
        ctx.load_dialect(dialect)
    return ctx
