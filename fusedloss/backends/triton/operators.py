"""The operators torch.ops.fusedloss_triton.*, with the schemas and the ways of csrc/ops.cpp.

They need no compiled extension: their autograd Functions are those of fusedloss/autograd.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import autograd
from . import common, cross_entropy, pointwise

DEVICES = ("CPU", "CUDA", "XPU")  # CPU: in Triton's interpreter

_torch_library: Any = torch.library  # untyped in some of the releases
library = _torch_library.Library("fusedloss_triton", "DEF")
operators: Any = torch.ops.fusedloss_triton


library.define("empty_gradient(Tensor input) -> Tensor")
library.impl("empty_gradient", common.empty_gradient, "CompositeExplicitAutograd")


def _define(loss: str, engine: ModuleType, call: str, function: Any) -> None:
    """The operators of an engine. call: the arguments of its run(), of which input is the first and
    the dtype of the loss the last."""

    def forward_pass(*args: Any, **wanted: Any) -> Any:
        common.raise_faults()
        value = engine.run(*args, **wanted)
        if args[0].device.type == "cpu":
            common.raise_faults(when="")
        return value

    def value(*args: Any) -> Any:
        *args, _ = args
        nothing = args[0].new_zeros(2, dtype=torch.float64)
        return forward_pass(*args, gradient=None, scales=nothing, prediction=nothing)

    def forward(*args: Any) -> Any:
        *args, prediction = args
        gradient = common.empty_gradient(args[0])
        # What other streams teach the prediction meanwhile is not this call's.
        scales = prediction.clone()
        loss = forward_pass(*args, gradient=gradient, scales=scales, prediction=prediction)
        return loss, gradient, scales

    def backward(gradient: Tensor, grad_output: Tensor, scales: Tensor, fresh: bool, *args: Any):
        *args, prediction = args
        engine.run(
            *args,
            gradient=gradient,
            scales=scales,
            prediction=prediction,
            grad_output=grad_output,
            fresh=fresh,
        )

    def meta_value(*args: Any) -> Tensor:
        return engine.empty_loss(args[0], *args[-3:-1])

    def meta_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        gradient = common.empty_gradient(args[0])
        return meta_value(*args), gradient, args[0].new_empty(2, dtype=torch.float64)

    def differentiable(*args: Any) -> Any:
        if torch.is_grad_enabled() and args[0].requires_grad:
            return function.apply(*args)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return getattr(operators, loss).default(*args)

    schemas = {
        loss: (f"({call}, Tensor prediction) -> Tensor", value, meta_value),
        f"{loss}_forward": (
            f"({call}, Tensor prediction) -> (Tensor loss, Tensor gradient, Tensor scales)",
            forward,
            meta_forward,
        ),
        f"{loss}_backward_": (
            "(Tensor(a!) gradient, Tensor grad_output, Tensor scales, bool fresh, "
            f"{call}, Tensor(b!) prediction) -> ()",
            backward,
            lambda *args: None,
        ),
    }
    for name, (schema, kernel, meta) in schemas.items():
        library.define(name + schema)
        for device in DEVICES:
            library.impl(name, kernel, device)
        library.impl(name, meta, "Meta")
    library.impl(loss, differentiable, "Autograd")


_define(
    "pointwise",
    pointwise,
    "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str loss, float parameter, "
    "int ignore_index, int reduction, ScalarType dtype",
    autograd.PointwiseFunction,
)
_define(
    "cross_entropy",
    cross_entropy,
    "Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "int reduction, ScalarType dtype",
    autograd.CrossEntropyFunction,
)
