"""The prediction of a call site's upstream gradient, for which a forward writes the gradient already.

Two numbers on the device: the upstream gradient that the last backward saw, and the confidence in it,
0 to 3. From 2 on a forward goes by it; backwards teach both. See docs/one-pass.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends

_C: Any = backends.extension
_cuda: Any = torch.cuda  # untyped in some of the releases


def is_captured(input: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def new_prediction(input: Tensor) -> Tensor:
    """A call site's, on input's device: 1, with full confidence. A CUDA graph that is being captured
    does not see how it is written: each replay would write it again."""
    if backends.compiles_for(input.device.type):
        made: Tensor = _C.new_prediction(input)
        return made
    if not is_captured(input):
        return _written(input)
    side = _cuda.Stream(input.device)
    with torch.cuda.stream(side):
        made = _written(input)
    side.synchronize()
    return made


def _written(input: Tensor) -> Tensor:
    prediction = torch.ones(2, dtype=torch.float64, device=input.device)
    prediction[1].fill_(3.0)
    return prediction
