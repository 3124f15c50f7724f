"""The meaning of every operation in plain torch, a file per dialect, and evaluators built from nothing else.

Written to be obviously right, not fast, and apart from the backends' kernels: these are checked against it, and so
is every pass.
"""

from sagellm.ir.reference.evaluate import MEANINGS, evaluate_model, evaluate_step, evaluate_weights
from sagellm.ir.reference.values import Cache, Forwarded, LogicalRows, StepResult, Weights

__all__ = [
    "MEANINGS",
    "Cache",
    "Forwarded",
    "LogicalRows",
    "StepResult",
    "Weights",
    "evaluate_model",
    "evaluate_step",
    "evaluate_weights",
]
