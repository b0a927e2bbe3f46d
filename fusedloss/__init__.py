"""Fused losses for PyTorch: value and gradient in one pass.

The functions of :mod:`fusedloss.functional` and the modules here take the place of
:mod:`torch.nn.functional`'s and :mod:`torch.nn`'s of the same names.
"""

from typing import Any

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError) as error:
    from .doctor import torch_does_not_import

    raise ImportError(torch_does_not_import(error)) from error

from . import functional, reference
from ._version import __version__
from .backends import backend, check, info
from .custom import linear, pointwise_loss, row_loss
from .functional import explain
from .language_models import PatchedLM, patch_lm
from .modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CosineEmbeddingLoss,
    CrossEntropyLoss,
    GaussianNLLLoss,
    HingeEmbeddingLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    LinearCrossEntropyLoss,
    LogLoss,
    LogSoftmax,
    MAELoss,
    MarginRankingLoss,
    MSELoss,
    MultiLabelSoftMarginLoss,
    MultiMarginLoss,
    NLLLoss,
    PoissonNLLLoss,
    SmoothL1Loss,
    SoftMarginLoss,
    TripletMarginLoss,
)
from .patching import patch, replace, restore

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogLoss",
    "LogSoftmax",
    "MAELoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PatchedLM",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TripletMarginLoss",
    "__version__",
    "backend",
    "check",
    "explain",
    "functional",
    "info",
    "linear",
    "math",
    "patch",
    "patch_lm",
    "pointwise_loss",
    "reference",
    "replace",
    "restore",
    "row_loss",
]


def __getattr__(name: str) -> Any:
    # Not imported above, for it imports SymPy, which takes a while.
    if name == "math":
        from importlib import import_module

        return import_module(".math", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
