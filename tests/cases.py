"""The table of cases, loss x option x shape, that the tests and the bench loop over.

A family is one loss with one set of options (``cross_entropy-weight-smoothing``); a case is a
family at one shape. ``Case.sample`` draws inputs that are valid for the loss, in any dtype.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Draw = Callable[[Shape, torch.dtype, torch.Generator], Tensor]

# Where the tests compute. conftest.py makes it the default device, and samples are moved there.
DEVICE = os.environ.get("FUSEDLOSS_TEST_DEVICE", "cpu")

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
REDUCTIONS = ("none", "mean", "sum")


def dtypes(family: str) -> dict[str, torch.dtype]:
    """Those of DTYPES that torch's function takes: on the CPU its multi_margin_loss lacks two."""
    lacks = ("bf16", "fp16") if family.startswith("multi_margin") and DEVICE == "cpu" else ()
    return {name: dtype for name, dtype in DTYPES.items() if name not in lacks}


def narrow(family: str) -> torch.dtype:
    """bfloat16, if torch's function takes it."""
    return dtypes(family).get("bf16", torch.float32)


# Vector registers hold 2 to 32 elements: tails on either side of each width.
TAILS = (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
# More than one chunk of parallel work, with a tail.
LARGE = (70_001, 2**17 + 3)

POINTWISE_SHAPES: tuple[Shape, ...] = (
    (),
    (0,),
    (3, 0, 2),
    (1,),
    *((n,) for n in TAILS),
    (5, 13),
    (3, 4, 5),
    (2, 3, 4, 5),
    (4099,),
    *((n,) for n in LARGE),
)
POINTWISE_FEW: tuple[Shape, ...] = (
    (),
    (0,),
    (1,),
    (17,),
    (33,),
    (65,),
    (5, 13),
    (2, 3, 4, 5),
    (4099,),
    (70_001,),
)
# For a loss whose engine other losses test.
POINTWISE_FEWEST: tuple[Shape, ...] = ((), (0,), (1,), (33,), (5, 13), (2, 3, 4, 5), (4099,))
# An option that lives on the last dimension needs one.
BROADCAST_SHAPES: tuple[Shape, ...] = (
    (0, 3),
    (1,),
    (7,),
    (5, 13),
    (3, 4, 5),
    (2, 3, 4, 33),
    (4099, 17),
)
CLASS_SHAPES: tuple[Shape, ...] = (
    (5,),  # unbatched
    (0, 5),
    (3, 5, 0),
    (1, 1),
    (1, 5),
    *((3, c) for c in TAILS),
    (64, 10),
    (33, 1000),
    (3, 4099),
    (2, 70_001),
    (1, 2**17 + 3),
    (40_001, 3),
    (2, 5, 7),
    (2, 3, 1, 9),
    (4, 21, 16, 17),
    (2, 3, 4, 5, 6),
)
CLASS_FEW: tuple[Shape, ...] = (
    (5,),
    (0, 5),
    (1, 5),
    (3, 17),
    (4, 33),
    (64, 10),
    (3, 4099),
    (9001, 16),
    (2, 5, 7),
    (4, 21, 9, 17),
)
ROW_SHAPES: tuple[Shape, ...] = (
    (0, 5),
    (1, 1),
    (1, 5),
    *((3, c) for c in TAILS),
    (64, 10),
    (3, 4099),
    (9001, 16),
)
ROW_FEW: tuple[Shape, ...] = ((0, 5), (1, 5), (3, 17), (64, 10), (3, 4099), (9001, 16))
ROW_FEWEST: tuple[Shape, ...] = ((5,), (1, 5), (0, 5), (3, 17), (2, 3, 4, 5), (64, 10))

PAIR_SHAPES: tuple[Shape, ...] = ((5,), (1, 5), (3, 17), (64, 10), (3, 4099), (700, 33))

IGNORED = 1  # an ignore_index that is also a class, for the families that ask for one


def real(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Unit normal."""
    # Drawn in fp64 so that every dtype gets the same numbers, rounded.
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def logit(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal, wide enough for saturated and undecided rows."""
    return real(shape, torch.float64, generator).mul(3).to(dtype)


def positive(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights, in [0.25, 2)."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return uniform.mul(1.75).add(0.25).to(dtype)


def inner_probability(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """In [0.02, 0.98]: away from the poles of log(x) and log(1 - x)."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return uniform.mul(0.96).add(0.02).to(dtype)


def any_probability(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """In [0, 1], a quarter of them exactly 0 and a quarter exactly 1."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return uniform.mul(2).sub(0.5).clamp(0, 1).to(dtype)


def sign(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """1 or -1."""
    return torch.randint(2, shape, generator=generator).mul(2).sub(1).to(dtype)


def row_sign(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """1, -1 or 0 for each row along the last dimension."""
    return torch.randint(-1, 2, shape[:-1], generator=generator).to(dtype)


def count(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A whole number from 0 to 5."""
    return torch.randint(6, shape, generator=generator).to(dtype)


def log_probability(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return inner_probability(shape, torch.float64, generator).log().to(dtype)


def distribution(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Probabilities along the class dimension."""
    class_dim = 1 if len(shape) > 1 else 0
    return real(shape, torch.float64, generator).softmax(class_dim).to(dtype)


def sparse_distribution(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Probabilities along the last dimension, about a third of them exactly 0."""
    mass = torch.rand(shape, generator=generator, dtype=torch.float64).sub(1 / 3).clamp(min=0)
    mass[..., 0] += 0.1  # a row must not sum to 0
    return mass.div(mass.sum(-1, keepdim=True)).to(dtype)


def class_index(shape: Shape, _dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    classes = shape[1] if len(shape) > 1 else shape[0]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return torch.randint(classes, rows, generator=generator)


def some_ignored(value: int) -> Draw:
    """Class indices, about a third of them ``value`` (the first kept, so a mean exists)."""

    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        index = class_index(shape, dtype, generator)
        index[torch.rand(index.shape, generator=generator) < 1 / 3] = value
        if index.numel():
            index.view(-1)[0] = 0
        return index

    return draw


def on_last_dim(draw: Draw) -> Draw:
    return lambda shape, dtype, generator: draw(shape[-1:], dtype, generator)


def on_class_dim(draw: Draw) -> Draw:
    return lambda shape, dtype, generator: draw(
        shape[1:2] if len(shape) > 1 else shape, dtype, generator
    )


@dataclass(frozen=True)
class Sample:
    """Arguments of one call: ``function(input, target, **options)``."""

    input: Tensor
    target: Tensor
    options: dict[str, Any]


@dataclass(frozen=True, eq=False)  # compared by identity, so that caches can be keyed by cases
class Case:
    """One loss, one set of options, one shape."""

    family: str
    loss: str
    shape: Shape
    draw_input: Draw
    draw_target: Draw
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Draw] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.family}-{'x'.join(map(str, self.shape)) or 'scalar'}"

    def sample(self, dtype: torch.dtype, seed: int = 0) -> Sample:
        """Draw the arguments; same seed, same numbers (rounded to ``dtype``) on every device."""
        generator = torch.Generator().manual_seed(seed)
        with torch.device("cpu"):
            drawn = {key: draw(self.shape, dtype, generator) for key, draw in self.tensors.items()}
            input = self.draw_input(self.shape, dtype, generator)
            target = self.draw_target(self.shape, dtype, generator)
        return Sample(
            input=input.to(DEVICE),
            target=target.to(DEVICE),
            options={**self.options, **{key: t.to(DEVICE) for key, t in drawn.items()}},
        )


def _family(
    loss: str,
    option: str,
    draws: tuple[Draw, Draw],
    shapes: Sequence[Shape],
    options: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Draw] | None = None,
    tags: Sequence[str] = (),
) -> list[Case]:
    name = f"{loss}-{option}" if option else loss
    return [
        Case(
            family=name,
            loss=loss,
            shape=shape,
            draw_input=draws[0],
            draw_target=draws[1],
            options=options or {},
            tensors=tensors or {},
            tags=frozenset(tags),
        )
        for shape in shapes
    ]


_REGRESSION = (real, real)
_BCE = (inner_probability, any_probability)
_BCE_LOGITS = (logit, any_probability)
_INDEX = (logit, class_index)
_SOFT = (logit, distribution)
_LOG = (distribution, class_index)

CASES: tuple[Case, ...] = tuple(
    itertools.chain(
        _family("mse_loss", "", _REGRESSION, POINTWISE_SHAPES),
        _family("mse_loss", "weight", _REGRESSION, POINTWISE_FEW, tensors={"weight": positive}),
        _family("l1_loss", "", _REGRESSION, POINTWISE_SHAPES),
        _family("l1_loss", "weight", _REGRESSION, POINTWISE_FEW, tensors={"weight": positive}),
        _family("smooth_l1_loss", "", _REGRESSION, POINTWISE_SHAPES),
        _family("smooth_l1_loss", "beta0.3", _REGRESSION, POINTWISE_FEW, {"beta": 0.3}),
        _family("smooth_l1_loss", "beta0", _REGRESSION, POINTWISE_FEW, {"beta": 0.0}),
        _family("huber_loss", "", _REGRESSION, POINTWISE_SHAPES),
        _family("huber_loss", "delta0.5", _REGRESSION, POINTWISE_FEW, {"delta": 0.5}),
        _family(
            "huber_loss",
            "delta2-weight",
            _REGRESSION,
            POINTWISE_FEW,
            {"delta": 2.0},
            {"weight": positive},
        ),
        _family("binary_cross_entropy", "", _BCE, POINTWISE_SHAPES),
        _family(
            "binary_cross_entropy", "weight", _BCE, POINTWISE_FEW, tensors={"weight": positive}
        ),
        _family(
            "binary_cross_entropy",
            "lastdim_weight",
            _BCE,
            BROADCAST_SHAPES,
            tensors={"weight": on_last_dim(positive)},
        ),
        _family(
            "binary_cross_entropy",
            "poles",
            (any_probability, any_probability),
            POINTWISE_FEW,
            # The gradient at a pole is 1e12: infinite in fp16.
            tags=("pole",),
        ),
        _family("binary_cross_entropy_with_logits", "", _BCE_LOGITS, POINTWISE_SHAPES),
        _family(
            "binary_cross_entropy_with_logits",
            "weight",
            _BCE_LOGITS,
            POINTWISE_FEW,
            tensors={"weight": positive},
        ),
        _family(
            "binary_cross_entropy_with_logits",
            "pos_weight",
            _BCE_LOGITS,
            POINTWISE_FEW,
            tensors={"pos_weight": positive},
        ),
        _family(
            "binary_cross_entropy_with_logits",
            "weight-pos_weight",
            _BCE_LOGITS,
            POINTWISE_FEW,
            tensors={"weight": positive, "pos_weight": positive},
        ),
        _family(
            "binary_cross_entropy_with_logits",
            "lastdim_weight-lastdim_pos_weight",
            _BCE_LOGITS,
            BROADCAST_SHAPES,
            tensors={"weight": on_last_dim(positive), "pos_weight": on_last_dim(positive)},
        ),
        _family("soft_margin_loss", "", (logit, sign), POINTWISE_FEWEST),
        _family("hinge_embedding_loss", "", (real, sign), POINTWISE_FEWEST, {"margin": 0.5}),
        _family(
            "margin_ranking_loss",
            "",
            _REGRESSION,
            POINTWISE_FEWEST,
            {"margin": 0.25},
            {"target": sign},
        ),
        _family("multilabel_soft_margin_loss", "", _BCE_LOGITS, ROW_FEWEST),
        _family(
            "multilabel_soft_margin_loss",
            "weight",
            _BCE_LOGITS,
            ROW_FEWEST,
            tensors={"weight": on_last_dim(positive)},
        ),
        _family("kl_div", "", (log_probability, any_probability), POINTWISE_FEWEST),
        _family(
            "kl_div",
            "log_target",
            (log_probability, log_probability),
            POINTWISE_FEWEST,
            {"log_target": True},
        ),
        _family("poisson_nll_loss", "", (real, count), POINTWISE_FEWEST),
        _family("poisson_nll_loss", "full", (real, count), POINTWISE_FEWEST, {"full": True}),
        _family(
            "poisson_nll_loss",
            "rate-full",
            (positive, count),
            POINTWISE_FEWEST,
            {"log_input": False, "full": True},
        ),
        _family("gaussian_nll_loss", "", _REGRESSION, POINTWISE_FEWEST, tensors={"var": positive}),
        _family(
            "gaussian_nll_loss",
            "eps1-full",
            _REGRESSION,
            POINTWISE_FEWEST,
            {"eps": 1.0, "full": True},
            {"var": positive},
        ),
        _family("cross_entropy", "", _INDEX, CLASS_SHAPES),
        _family(
            "cross_entropy",
            "weight",
            _INDEX,
            CLASS_FEW,
            tensors={"weight": on_class_dim(positive)},
        ),
        _family("cross_entropy", "ignored", (logit, some_ignored(-100)), CLASS_FEW),
        _family(
            "cross_entropy",
            "ignored_class",
            (logit, some_ignored(IGNORED)),
            CLASS_FEW,
            {"ignore_index": IGNORED},
        ),
        _family("cross_entropy", "smoothing", _INDEX, CLASS_FEW, {"label_smoothing": 0.1}),
        _family(
            "cross_entropy",
            "weight-smoothing",
            _INDEX,
            CLASS_FEW,
            {"label_smoothing": 0.2},
            {"weight": on_class_dim(positive)},
        ),
        _family(
            "cross_entropy",
            "weight-smoothing-ignored",
            (logit, some_ignored(-3)),
            CLASS_FEW,
            {"label_smoothing": 0.3, "ignore_index": -3},
            {"weight": on_class_dim(positive)},
        ),
        _family("cross_entropy", "probabilities", _SOFT, CLASS_SHAPES),
        _family(
            "cross_entropy",
            "probabilities-weight",
            _SOFT,
            CLASS_FEW,
            tensors={"weight": on_class_dim(positive)},
        ),
        _family(
            "cross_entropy",
            "probabilities-weight-smoothing",
            _SOFT,
            CLASS_FEW,
            {"label_smoothing": 0.1},
            {"weight": on_class_dim(positive)},
        ),
        _family("log_loss", "", _LOG, ROW_SHAPES),
        _family("log_loss", "weight", _LOG, ROW_FEW, tensors={"weight": on_class_dim(positive)}),
        _family("log_loss", "ignored", (distribution, some_ignored(-100)), ROW_FEW),
        _family(
            "log_loss",
            "weight-ignored_class",
            (distribution, some_ignored(IGNORED)),
            ROW_FEW,
            {"ignore_index": IGNORED},
            {"weight": on_class_dim(positive)},
        ),
        _family("log_loss", "probabilities", (distribution, distribution), ROW_SHAPES),
        _family(
            "log_loss",
            "probabilities-weight",
            (distribution, distribution),
            ROW_FEW,
            tensors={"weight": on_class_dim(positive)},
        ),
        # Zero probabilities: the clamp at eps.
        _family("log_loss", "clamped", (sparse_distribution, distribution), ROW_FEW),
        _family(
            "cosine_embedding_loss",
            "",
            _REGRESSION,
            PAIR_SHAPES,
            {"margin": 0.1},
            {"target": row_sign},
        ),
        _family("triplet_margin_loss", "", _REGRESSION, ROW_FEWEST, tensors={"negative": real}),
        _family(
            "triplet_margin_loss",
            "swap-margin2-eps0.1",
            _REGRESSION,
            ROW_FEWEST,
            {"margin": 2.0, "eps": 0.1, "swap": True},
            {"negative": real},
        ),
        _family("multi_margin_loss", "", _INDEX, PAIR_SHAPES),
        _family(
            "multi_margin_loss",
            "squared-weight",
            _INDEX,
            PAIR_SHAPES,
            {"p": 2, "margin": 0.5},
            {"weight": on_class_dim(positive)},
        ),
    )
)

FAMILIES: dict[str, tuple[Case, ...]] = {
    name: tuple(cases) for name, cases in itertools.groupby(CASES, key=lambda case: case.family)
}
LOSSES: tuple[str, ...] = tuple(dict.fromkeys(case.loss for case in CASES))
# Those that the tests of engines, operators and calls loop over: the others are no different there.
BASIC: tuple[str, ...] = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "log_loss",
)


def at_shape(family: str, shape: Shape) -> Case:
    """The family at another shape."""
    first = FAMILIES[family][0]
    return Case(
        family=family,
        loss=first.loss,
        shape=shape,
        draw_input=first.draw_input,
        draw_target=first.draw_target,
        options=first.options,
        tensors=first.tensors,
        tags=first.tags,
    )
