"""Asks the CUDA engines, compiled over the emulator, for losses and gradients of CPU tensors.

``Calls`` lists calls and the memory they work on; runner.cpp runs them. ``Loss`` makes of one loss
what csrc/torch/cuda.cpp makes of it, and ``OwnLoss`` of a custom loss.
"""

from __future__ import annotations

import inspect
import math
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import build
import fusedloss.functional as FL
from cases import Sample
from fusedloss._losses import LOSSES

SOURCES = [Path("csrc/cuda", name) for name in ("pointwise.cu", "custom.cu", "rows.cu")]
RUNNER = Path("tests/cuda_emulator/runner.cpp")

# In the order of DType in csrc/call.h.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
FAULT = struct.Struct("iiqdqq")


class Pass(IntEnum):
    VALUE = 0
    FORWARD = 1
    BACKWARD = 2


@dataclass(frozen=True)
class Place:
    """Somewhere in the memory of the calls."""

    buffer: int
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.buffer} {self.offset}"


NOWHERE = Place(-1)
NOTHING_COUNTED: list[object] = [NOWHERE, 0, 0, 0, NOWHERE, 0, 0]  # ClassWeights of kernels.h


def _number(dtype: torch.dtype) -> int:
    return DTYPES.index(dtype)


def _extent(tensor: Tensor) -> int:
    """How many elements lie between the first and the last."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


class Calls:
    """Calls of the engines, and the buffers that they read and write."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._buffers: list[bytes] = []

    def put(self, tensor: Tensor, shift: int = 0) -> Place:
        """A buffer with the tensor's elements, as they lie in its memory, behind ``shift`` more."""
        flat = tensor.detach().as_strided((_extent(tensor),), (1,))
        data = flat.contiguous().view(torch.uint8).numpy().tobytes()
        before = shift * tensor.element_size()
        self._buffers.append(b"\xff" * before + data)
        return Place(len(self._buffers) - 1, before)

    def empty_like(self, tensor: Tensor, shift: int = 0) -> Place:
        """A buffer for as much, of bytes that are nan in every dtype."""
        return self.put(torch.full_like(tensor, math.nan), shift)

    def add(self, engine: str, *words: object) -> None:
        self._lines.append(" ".join(map(str, (engine, *words))))

    def teach(self, place: Place, upstreams: Sequence[float] = (), every: int = 1) -> None:
        """What is called next finds other streams teach the prediction there; NOWHERE: no more."""
        self.add("teach", place, every, len(upstreams), *upstreams)

    def run(self, program: Path, settings: Mapping[str, str] | None = None) -> None:
        """Runs the calls in order; ``get`` then finds what they have written."""
        with tempfile.TemporaryDirectory() as folder:
            memory, calls = Path(folder, "memory"), Path(folder, "calls")
            memory.write_bytes(b"".join(self._buffers))
            sizes = [len(self._buffers), *map(len, self._buffers)]
            calls.write_text("\n".join([" ".join(map(str, sizes)), *self._lines]))
            result = build.run(program, str(calls), str(memory), settings=settings)
            if result.returncode or result.stderr:
                raise AssertionError(f"runner: exit status {result.returncode}\n{result.stderr}")
            data = memory.read_bytes()
        start = 0
        for i, size in enumerate(sizes[1:]):
            self._buffers[i] = data[start : start + size]
            start += size

    def get(self, place: Place, like: Tensor) -> Tensor:
        """The tensor that lies there as ``like`` does in its memory."""
        size = _extent(like) * like.element_size()
        data = bytearray(self._buffers[place.buffer][place.offset : place.offset + size])
        return torch.frombuffer(data, dtype=like.dtype).as_strided(like.shape, like.stride())

    def fault(self, place: Place) -> tuple[int, int, int, float, int, int]:
        """State, what, position, value, index, classes: see Fault in csrc/cuda/kernels.h."""
        state, what, position, value, index, classes = FAULT.unpack(self._buffers[place.buffer])
        return state, what, position, value, index, classes


def _class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def _dense_like(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In the order of input's memory where that has no gaps, else row-major."""
    dense = _extent(input) == input.numel()
    layout = torch.preserve_format if dense else torch.contiguous_format
    return torch.full_like(input, math.nan, dtype=dtype, memory_format=layout)


class Loss:
    """One call of a loss; a pass is queued by ``value``, ``forward`` or ``backward``.

    ``shifts`` move the input and all else by so many elements off their alignment.
    """

    def __init__(
        self,
        calls: Calls,
        loss: str,
        sample: Sample,
        reduction: str,
        prediction: tuple[float, float] = (1.0, 0.0),
        shifts: tuple[int, int] = (0, 0),
    ) -> None:
        self.calls, self.sample, self.reduction = calls, sample, reduction
        input_shift, self.shift = shifts
        self.each = reduction == "none"
        input, target, options = sample.input, sample.target, dict(sample.options)
        self.by_class = target.dtype is torch.int64
        self.weight: Tensor | None = options.get("weight")
        self.fault = calls.put(torch.zeros(FAULT.size, dtype=torch.uint8))
        self.forward_state = calls.put(torch.full((2,), math.nan, dtype=torch.float64))
        self.prediction = calls.put(torch.tensor(prediction, dtype=torch.float64))
        self.input, self.input_shift = calls.put(input, input_shift), input_shift
        self._engine = self._make_engine(loss, options)
        self.loss = calls.empty_like(torch.empty((), dtype=input.dtype))
        self._renew_gradients()
        self.class_weights: list[object] = NOTHING_COUNTED  # what forward counts
        self.normalizer = self._divide(loss, options)

    def _make_engine(self, loss: str, options: dict[str, Any]) -> Any:
        engine = _CrossEntropy if loss == "cross_entropy" else _Pointwise
        return engine(self, loss, self.sample.input, self.sample.target, options)

    def _renew_gradients(self) -> None:
        # An aligned input has an aligned gradient, as fresh memory is: the kernel depends on both, and
        # a value alone has no gradient.
        shift = self.shift if self.input_shift else 0
        self.gradient = self.calls.empty_like(_dense_like(self.sample.input), shift)

    def _divide(self, loss: str, options: dict[str, Any]) -> float:
        """What the mean divides by; nan: it stands in forward_state, or will."""
        input, target, weight = self.sample.input, self.sample.target, self.weight
        if self.reduction != "mean":
            return 1
        if loss in ("cross_entropy", "log_loss"):
            classes = input.shape[_class_dim(input)]
            if not self.by_class:
                return input.numel() / classes
            wide = loss == "log_loss" or input.dtype is torch.float64
            dtype = torch.float64 if wide else torch.float32
            self.class_weights = [
                *(self.calls.put(target.contiguous()), target.numel(), classes),
                options.get("ignore_index", -100),
                NOWHERE if weight is None else self.calls.put(weight.to(dtype)),
                *(int(wide), 0),
            ]
        if self._mean_over_weights(loss) and weight is not None:
            both = torch.stack([torch.tensor(math.nan).double(), weight.double().sum()])
            self.forward_state = self.calls.put(both)
            return math.nan
        return input.numel()

    def _mean_over_weights(self, loss: str) -> bool:
        return loss in ("mse_loss", "l1_loss")

    def _gradients(self) -> tuple[Place, ...]:
        """Of input, and of target."""
        return self.gradient, NOWHERE

    def _launch(
        self,
        stage: Pass,
        normalizer: float,
        loss: Place = NOWHERE,
        grad_output: Place = NOWHERE,
        fresh: bool = False,
    ) -> list[object]:
        dtype = _number(self.sample.input.dtype)
        prediction = NOWHERE if self.each else self.prediction
        return [
            *(int(stage), loss, dtype, self.forward_state, normalizer, prediction),
            *(grad_output, dtype, int(fresh), self.fault),
            *(NOTHING_COUNTED if stage is Pass.BACKWARD else self.class_weights),
        ]

    def value(self) -> None:
        self._compute(Pass.VALUE)

    def forward(self) -> None:
        self._compute(Pass.FORWARD)

    def _compute(self, stage: Pass) -> None:
        gradients = self._gradients()
        if stage is Pass.VALUE:
            gradients = tuple(NOWHERE for _ in gradients)
        loss = NOWHERE if self.each else self.loss
        values = self._engine.value if self.each else NOWHERE
        self._engine.add(values, gradients, None, self._launch(stage, self.normalizer, loss))

    def backward(self, upstream: Tensor, fresh: bool = False) -> None:
        """``fresh``: into new memory, whatever forward has left."""
        if fresh:
            self._renew_gradients()
        grad_output = NOWHERE if self.each else self.calls.put(upstream)
        launch = self._launch(Pass.BACKWARD, math.nan, NOWHERE, grad_output, fresh)
        self._engine.add(NOWHERE, self._gradients(), upstream if self.each else None, launch)

    def value_found(self) -> Tensor:
        if not self.each:
            return self.calls.get(self.loss, torch.empty((), dtype=self.sample.input.dtype))
        return self._engine.values_found()

    def gradient_found(self) -> Tensor:
        return self.calls.get(self.gradient, _dense_like(self.sample.input))

    def gradients_found(self) -> list[Tensor]:
        return [self.gradient_found()]

    def prediction_found(self) -> list[float]:
        return self._two_doubles(self.prediction)

    def forward_state_found(self) -> list[float]:
        return self._two_doubles(self.forward_state)

    def is_patchwork(self, fresh: Mapping[float, Loss]) -> bool:
        """Whether the gradient is not all of it the one for the upstream gradient that forward_state
        names; those of ``fresh`` are. Nan names none, as where the gradient was not written."""
        upstream, _ = self.forward_state_found()
        if math.isnan(upstream):
            return False
        found, expected = self.gradient_found(), fresh[upstream].gradient_found()
        return found.numpy().tobytes() != expected.numpy().tobytes()

    def _two_doubles(self, place: Place) -> list[float]:
        found: list[float] = self.calls.get(place, torch.zeros(2).double()).tolist()
        return found


class _Engine:
    """What both families' calls share: a call in the words of runner.cpp."""

    of: Loss
    input: Tensor
    head: Sequence[object]  # the loss and its parameters
    space: Sequence[int]
    operands: Sequence[Sequence[object]]  # input, target, weight, third input
    weight_sum = NOWHERE
    value_dtype: torch.dtype
    gradient_strides: Sequence[int] = (0, 0, 0)

    def upstream_operand(self, upstream: Tensor | None) -> Sequence[object]:
        raise NotImplementedError

    def add(
        self,
        value: Place,
        gradients: tuple[Place, ...],
        upstream: Tensor | None,
        launch: list[object],
    ) -> None:
        input, target_dtype = self.input, self.of.sample.target.dtype
        self.of.calls.add(
            *self.head,
            int(input.dtype is torch.float64),
            self.of.sample.options.get("ignore_index", -100),
            *(input.numel(), len(self.space), *self.space),
            *(word for operand in self.operands for word in operand),
            *self.upstream_operand(upstream),
            self.weight_sum,
            *(value, _number(self.value_dtype), gradients[0], _number(input.dtype)),
            *(gradients[1], _number(target_dtype), *self.gradient_strides),
            *launch,
        )


class _Pointwise(_Engine):
    def __init__(
        self, of: Loss, loss: str, input: Tensor, target: Tensor, options: dict[str, Any]
    ) -> None:
        self.of, self.input = of, input
        row = LOSSES[loss] if loss else LOSSES["mse_loss"]  # a custom loss needs none of it
        arguments = inspect.signature(getattr(FL, row.name)).parameters
        given = {name: argument.default for name, argument in arguments.items()} | options
        parameters = [float(given[name]) for name in row.parameters]
        self.is_log_loss = loss == "log_loss"
        name = loss
        if row.variant != "pos_weight" and given.get(row.variant):
            name += f"_{row.variant}"
        if loss == "smooth_l1_loss" and parameters == [0]:
            name, parameters = "l1_loss", []
        if "pos_weight" in options:
            name += "_pos_weight"
        weight = of.weight
        if self.is_log_loss:
            parameters = [torch.finfo(input.dtype).eps]
            if of.by_class:
                name = "log_loss_of_classes"
                target = target.unsqueeze(_class_dim(input))
            if weight is not None:
                weight = weight.view(-1, *[1] * (input.dim() - 1 - _class_dim(input)))
        self.head = self.loss_words(name, parameters)
        strides = _dense_like(input).stride()
        self.order = sorted(range(input.dim()), key=lambda d: -strides[d])
        self.space = [input.shape[d] for d in self.order]
        third = [options[name] for name in ("pos_weight", "var", "target") if name in options]
        self.operands = [
            self._operand(input, of.input),
            *map(self._operand, (target, weight, third[0] if third else None)),
        ]
        # Elements that are added up to rows are rounded after that.
        wide = self.is_log_loss and of.each
        self.value_dtype = torch.promote_types(input.dtype, torch.float32) if wide else input.dtype
        self.value = of.calls.empty_like(_dense_like(input, self.value_dtype), of.shift)

    def _operand(self, tensor: Tensor | None, place: Place | None = None) -> list[object]:
        if tensor is None:
            return [NOWHERE, 0, 1, -1, *[0] * self.input.dim()]
        by_class = tensor.dtype is torch.int64
        if place is None:
            place = self.of.calls.put(tensor, 0 if by_class else self.of.shift)
        seen = tensor.expand(self.input.shape).permute(self.order)
        return [
            place,
            _number(tensor.dtype),
            int(seen.is_contiguous() and not by_class),
            self.order.index(_class_dim(self.input)) if by_class else -1,
            *seen.stride(),
        ]

    def upstream_operand(self, upstream: Tensor | None) -> list[object]:
        if upstream is not None and self.is_log_loss:
            upstream = upstream.unsqueeze(_class_dim(self.input))
        return self._operand(upstream)

    def loss_words(self, name: str, parameters: Sequence[float]) -> list[object]:
        return ["built_in", name, len(parameters), *parameters]

    def values_found(self) -> Tensor:
        values = self.of.calls.get(self.value, _dense_like(self.input, self.value_dtype))
        if not self.is_log_loss:
            return values
        return values.sum(_class_dim(self.input)).to(self.input.dtype)


class OwnLoss(Loss):
    """One call of a custom loss, by its library.

    ``wants``: the gradients that are, of input and of target.
    """

    def __init__(
        self,
        calls: Calls,
        library: Path,
        parameters: Sequence[float],
        sample: Sample,
        reduction: str,
        prediction: tuple[float, float] = (1.0, 0.0),
        shifts: tuple[int, int] = (0, 0),
        wants: tuple[bool, bool] = (True, True),
    ) -> None:
        self.words = ["custom", library, len(parameters), *parameters]
        self.wants = wants
        super().__init__(calls, "", sample, reduction, prediction, shifts)

    def _make_engine(self, loss: str, options: dict[str, Any]) -> Any:
        return _OwnPointwise(self, loss, self.sample.input, self.sample.target, options)

    def _target_gradient(self) -> Tensor:
        return _dense_like(self.sample.input, self.sample.target.dtype)

    def _renew_gradients(self) -> None:
        super()._renew_gradients()
        # Beside input's as that lies; alone as fresh memory does, whatever the operands.
        shift = self.shift if self.wants[0] else 0
        self.target_gradient = self.calls.empty_like(self._target_gradient(), shift)

    def _mean_over_weights(self, loss: str) -> bool:
        return True

    def _gradients(self) -> tuple[Place, ...]:
        of_input, of_target = self.wants
        return (
            self.gradient if of_input else NOWHERE,
            self.target_gradient if of_target else NOWHERE,
        )

    def gradients_found(self) -> list[Tensor]:
        """Those that are wanted."""
        both = self.gradient_found(), self.calls.get(self.target_gradient, self._target_gradient())
        return [found for found, wanted in zip(both, self.wants, strict=True) if wanted]


class _OwnPointwise(_Pointwise):
    def loss_words(self, name: str, parameters: Sequence[float]) -> list[object]:
        words: list[object] = self.of.words
        return words


class _CrossEntropy(_Engine):
    def __init__(
        self, of: Loss, loss: str, input: Tensor, target: Tensor, options: dict[str, Any]
    ) -> None:
        self.of, self.input, calls = of, input, of.calls
        compute = torch.float64 if input.dtype is torch.float64 else torch.float32
        weight, smoothing = of.weight, options.get("label_smoothing", 0.0)
        self.head = ["built_in", loss, 1, smoothing]
        self.space = self._rows(input).shape
        self.operands = [
            self._operand(input, of.input),
            self._operand(target, calls.put(target, 0 if of.by_class else of.shift)),
            self._operand(weight, NOWHERE if weight is None else calls.put(weight.to(compute))),
            self._operand(None, NOWHERE),
        ]
        if weight is not None and smoothing:
            self.weight_sum = calls.put(weight.to(compute).double().sum())
        self.gradient_strides = self._rows(_dense_like(input)).stride()
        shape = input.shape[: _class_dim(input)] + input.shape[_class_dim(input) + 1 :]
        self.value_dtype = input.dtype
        self.values = torch.full(shape, math.nan, dtype=input.dtype)
        self.value = calls.empty_like(self.values)

    def _rows(self, tensor: Tensor) -> Tensor:
        """(outer, classes, inner)"""
        if tensor.dim() == 1:
            return tensor.view(1, -1, 1)
        return tensor.unsqueeze(2) if tensor.dim() == 2 else tensor.flatten(2)

    def _operand(self, tensor: Tensor | None, place: Place) -> list[object]:
        """Strides are those of an input or of class probabilities."""
        strides: Sequence[int] = (0, 0, 0)
        dtype = self.input.dtype if tensor is None else tensor.dtype
        if tensor is not None and tensor.shape == self.input.shape:
            strides = self._rows(tensor).stride()
        return [place, _number(dtype), 1, -1, *strides]

    def upstream_operand(self, upstream: Tensor | None) -> list[object]:
        return self._operand(None, NOWHERE if upstream is None else self.of.calls.put(upstream))

    def values_found(self) -> Tensor:
        return self.of.calls.get(self.value, self.values)


# ---- custom row losses ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsCall:
    """What a custom row loss is asked. ``kinds`` are names of Kind in csrc/math/custom_rows.h."""

    library: Path
    kinds: Sequence[str]
    sizes: tuple[int, ...]  # RowProgram.gpu_sizes
    parameters: Sequence[float]
    inputs: Sequence[Tensor]
    weight: Tensor | None = None  # of each row
    ignore_index: int = -100

    def of_kind(self, kind: str) -> list[Tensor]:
        return [t for t, its in zip(self.inputs, self.kinds, strict=True) if its == kind]


class RowLoss(Loss):
    """One call of a custom row loss; gradients are wanted where inputs require them."""

    def __init__(
        self,
        calls: Calls,
        call: RowsCall,
        reduction: str,
        prediction: tuple[float, float] = (1.0, 0.0),
        shifts: tuple[int, int] = (0, 0),
    ) -> None:
        self.call = call
        first, options = call.inputs[0].detach(), {"weight": call.weight}
        super().__init__(calls, "", Sample(first, first, options), reduction, prediction, shifts)

    def _make_engine(self, loss: str, options: dict[str, Any]) -> Any:
        return _CustomRows(self)

    def _divide(self, loss: str, options: dict[str, Any]) -> float:
        input, weight = self.sample.input, self.weight
        if self.reduction != "mean":
            return 1
        classes, labels = input.shape[_class_dim(input)], self.call.of_kind("kLabel")
        if labels:
            self.class_weights = [
                *(self.calls.put(labels[0]), labels[0].numel(), classes, self.call.ignore_index),
                NOWHERE if weight is None else self._engine.weight,
                *(int(input.dtype is torch.float64), 1),
            ]
        elif weight is not None:
            both = torch.stack([torch.tensor(math.nan).double(), weight.double().sum()])
            self.forward_state = self.calls.put(both)
            return math.nan
        return input.numel() / classes

    def _gradient_like(self, i: int) -> Tensor:
        """An element's lies like the first input, a row's in order."""
        t = self.call.inputs[i].detach()
        if self.call.kinds[i] == "kElement":
            return _dense_like(self.sample.input, t.dtype)
        return torch.full(t.shape, math.nan, dtype=t.dtype)

    def _renew_gradients(self) -> None:
        self.places = tuple(
            self.calls.empty_like(self._gradient_like(i), self.shift)
            if t.requires_grad
            else NOWHERE
            for i, t in enumerate(self.call.inputs)
        )

    def _gradients(self) -> tuple[Place, ...]:
        return self.places

    def gradients_found(self) -> list[Tensor]:
        return [
            self.calls.get(place, self._gradient_like(i))
            for i, place in enumerate(self.places)
            if place is not NOWHERE
        ]


class _CustomRows(_Engine):
    def __init__(self, of: RowLoss) -> None:
        self.of, self.input = of, of.sample.input
        call, self.calls = of.call, of.calls
        self.kinds = call.kinds
        bits = sum(1 << i for i, kind in enumerate(call.kinds) if kind == "kElement")
        compute = torch.float64 if self.input.dtype is torch.float64 else torch.float32
        self.head = [
            *("custom_rows", call.library, bits, *call.sizes),
            *(len(call.parameters), *call.parameters),
            *(int(compute is torch.float64), call.ignore_index, *self._rows(self.input).shape),
        ]
        shifts = [of.input_shift, *(of.shift for _ in call.inputs[1:])]
        self.inputs = [
            self._seen(t.detach(), kind, 0 if kind == "kLabel" else shift)
            for t, kind, shift in zip(call.inputs, call.kinds, shifts, strict=True)
        ]
        self.weight = NOWHERE
        self.weight_words = self._absent()
        if call.weight is not None:
            self.weight_words = self._seen(call.weight.to(compute), "kPerRow", 0)
            self.weight = self.weight_words[0]
        d = _class_dim(self.input)
        shape = [n for i, n in enumerate(self.input.shape) if i != d]
        self.values = torch.full(shape, math.nan, dtype=self.input.dtype)
        self.value = of.calls.empty_like(self.values)

    def _rows(self, tensor: Tensor) -> Tensor:
        """(outer, classes, inner)"""
        if tensor.dim() == 1:
            return tensor[None, :, None]
        return tensor.unsqueeze(2) if tensor.dim() == 2 else tensor.flatten(2)

    def _strides(self, tensor: Tensor, kind: str) -> list[int]:
        if kind == "kPerClass":
            return [0, *tensor.stride(), 0]
        if kind == "kElement":
            return list(self._rows(tensor).stride())
        outer, _, inner = self._rows(tensor.unsqueeze(_class_dim(self.input))).stride()
        return [outer, 0, inner]

    def _seen(self, tensor: Tensor, kind: str, shift: int) -> list[Any]:
        place = self.calls.put(tensor, shift)
        return [place, _number(tensor.dtype), 1, -1, *self._strides(tensor, kind)]

    def _absent(self) -> list[Any]:
        return [NOWHERE, 0, 1, -1, 0, 0, 0]

    def add(
        self,
        value: Place,
        gradients: tuple[Place, ...],
        upstream: Tensor | None,
        launch: list[object],
    ) -> None:
        outputs = []
        for i, (place, kind) in enumerate(zip(gradients, self.kinds, strict=True)):
            if place is NOWHERE:
                outputs.append([NOWHERE, 0, 0, 0, 0])
                continue
            like = self.of._gradient_like(i)
            outputs.append([place, _number(like.dtype), *self._strides(like, kind)])
        self.calls.add(
            *(*self.head, len(self.inputs)),
            *(w for pair in zip(self.inputs, outputs, strict=True) for side in pair for w in side),
            *self.weight_words,
            *(self._absent() if upstream is None else self._seen(upstream, "kPerRow", 0)),
            *(value, _number(self.values.dtype), 0),
            *launch,
        )

    def values_found(self) -> Tensor:
        return self.calls.get(self.value, self.values)
