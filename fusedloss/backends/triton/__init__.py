"""The Triton backend: imported at its first use, for Triton itself takes a while to import.

Needs no compiled extension. Where the environment says TRITON_INTERPRET=1, its kernels run on CPU
tensors, in Triton's interpreter.
"""

from .custom import load, load_rows
from .operators import loss, operators
from .runtime import raise_faults

__all__ = ["load", "load_rows", "loss", "operators", "raise_faults"]
