"""Custom losses: one line of maths, with the built-in losses' kernels.

    @fusedloss.pointwise_loss
    def charbonnier(input, target, *, eps=1e-3):
        return fm.sqrt((input - target) ** 2 + eps ** 2)

The function is called once, with SymPy symbols (tracing.py), and SymPy differentiates the formula
(primitives.py). A loss of rows (row_tracing.py) takes the form of walks over a row instead
(levels.py). The formulas are printed (printing.py) as C++ or Triton code, which is compiled where it
runs (prepare.py, building.py), and as plain PyTorch for calls that the kernels do not cover.
"""

from .linear_rows import LinearRowLoss, linear
from .loss import PointwiseLoss, pointwise_loss
from .module import PointwiseLossModule, RowLossModule
from .rows import RowLoss, row_loss

__all__ = [
    "LinearRowLoss",
    "PointwiseLoss",
    "PointwiseLossModule",
    "RowLoss",
    "RowLossModule",
    "linear",
    "pointwise_loss",
    "row_loss",
]
