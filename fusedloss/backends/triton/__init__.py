"""The Triton backend: imported at its first use, for Triton itself takes a while to import.

Needs no compiled extension. Where the environment says TRITON_INTERPRET=1, its kernels run on CPU
tensors, in Triton's interpreter.
"""

from .common import raise_faults
from .custom import load
from .operators import operators

__all__ = ["load", "operators", "raise_faults"]
