"""The Triton backend: imported at its first use, for Triton itself takes a while to import."""

from .common import raise_faults
from .operators import operators

__all__ = ["operators", "raise_faults"]
