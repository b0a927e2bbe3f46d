"""Language models of transformers, trained without their logits: :func:`patch_lm`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import functional

__all__ = ["PatchedLM", "patch_lm"]

_OPTIONS = ("label_smoothing", "z_loss", "options", "logits_dtype", "drop_ignored", "memory")
_LOSS = "ForCausalLMLoss"


def patch_lm(model: Any, *, eval_logits: bool = False, **options: Any) -> PatchedLM:
    """Makes a causal language model of transformers compute its loss without the logits, in place.

    Where the model is called with ``labels``, its output has ``logits=None``, and its loss comes from
    :func:`fusedloss.functional.linear_cross_entropy` of the last hidden states and the weight of the output
    embedding (``lm_head``): the value and the gradients of transformers' own loss but for rounding, with
    ``num_items_in_batch``, ``ignore_index`` and ``shift_labels`` as there, in float32. Where it is called
    without labels, nothing changes::

        patched = fusedloss.patch_lm(model)
        trainer.train()
        patched.remove()

    A model that multiplies or divides its logits by a number (Cohere, Granite), or caps them (Gemma), gets
    the loss of these logits. What else a model does to them is an error that names it.

    Args:
        model: a model with an output embedding that is a :class:`torch.nn.Linear`, and transformers' loss
            of causal language models; or PEFT's model around it. The weight may be that of the input
            embedding.
        eval_logits: whether a model in evaluation mode makes its logits as before, because something reads
            them, such as ``compute_metrics`` of a Trainer.
        options: ``label_smoothing``, ``z_loss``, ``options``, ``logits_dtype``, ``drop_ignored`` and
            ``memory`` of :func:`fusedloss.functional.linear_cross_entropy`.

    Returns:
        What undoes it, by ``remove()`` or at the end of a ``with`` block.

    Raises:
        TypeError: the model has no output embedding that is a plain linear layer, its forward takes no
            labels, or an option is unknown.
        ValueError: its loss is another one than that of causal language models, or it is patched already.

    A call with labels raises RuntimeError where the model does something else to its logits or makes no loss
    of them, TypeError where they come from elsewhere or its output embedding is no plain linear layer any
    more, and ValueError where this and the vocabulary differ in size.
    """
    unknown = sorted(set(options).difference(_OPTIONS))
    if unknown:
        raise TypeError(
            f"fusedloss.patch_lm: unknown option {unknown[0]!r}; there are {', '.join(_OPTIONS)}"
        )
    base = getattr(model, "get_base_model", None)  # of PEFT's models, which call its forward
    model = base() if callable(base) else model
    _head(model)
    _check_loss(model)
    parameters = list(inspect.signature(model.forward).parameters)
    if "labels" not in parameters:
        raise TypeError(f"fusedloss.patch_lm: the forward of {_name(model)} takes no labels")
    before = getattr(model.forward, "_patched_lm", None)
    if before is not None and before.active:
        raise ValueError(f"fusedloss.patch_lm: {_name(model)} is patched already")
    return PatchedLM(model, parameters.index("labels"), eval_logits, options)


class PatchedLM:
    """What :func:`patch_lm` returns. As a context manager it removes the patch at the end.

    Attributes:
        active: whether the patch is on. Copies of the model have the same patch.
    """

    def __init__(self, model: Any, place: int, eval_logits: bool, options: dict[str, Any]) -> None:
        self.active = True
        self._model = model
        self._before = model.__dict__.get("forward")
        bound = model.forward
        # The function itself, so that a copy of the model does not call this one.
        original = bound.__func__ if inspect.ismethod(bound) else _taking_self(bound)

        @functools.wraps(original)
        def forward(self_: Any, *args: Any, **kwargs: Any) -> Any:
            labels = kwargs.get("labels", args[place] if place < len(args) else None)
            if labels is None or not self.active or (eval_logits and not self_.training):
                return original(self_, *args, **kwargs)
            return _without_logits(self_, original, options, args, kwargs)

        forward._patched_lm = self  # type: ignore[attr-defined]
        # An attribute and no hook, since PEFT calls forward itself.
        self._forward = model.forward = MethodType(forward, model)

    def remove(self) -> None:
        """Takes the patch away. A second call does nothing."""
        if not self.active:
            return
        self.active = False
        # Where accelerate has wrapped the forward since, it stays, and calls the original.
        if self._model.__dict__.get("forward") is self._forward:
            del self._model.forward
            if self._before is not None:
                self._model.forward = self._before

    def __enter__(self) -> PatchedLM:  # noqa: PYI034 - there is no Self in Python 3.10
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _taking_self(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def original(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return original


# ---- which models --------------------------------------------------------------------------------


def _name(model: Any) -> str:
    return type(model).__name__


def _head(model: Any) -> nn.Linear:
    """The output embedding."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise TypeError(
            f"fusedloss.patch_lm takes a causal language model of transformers, and {_name(model)} has no "
            "output embedding"
        )
    # A layer with another forward computes something else: quantized weights, or LoRA's.
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or "forward" in head.__dict__:
        raise TypeError(
            f"fusedloss.patch_lm: the output embedding of {_name(model)} must be a torch.nn.Linear with its "
            f"own forward, not {type(head).__module__}.{_name(head)}"
        )
    return head  # type: ignore[no-any-return]


def _check_loss(model: Any) -> None:
    attribute = getattr(type(model), "loss_function", None)
    if not isinstance(attribute, property) or attribute.fset is None:
        raise ValueError(
            f"fusedloss.patch_lm: {_name(model)} has no loss_function that can be set, which models of newer "
            "releases of transformers have"
        )
    loss = model.loss_function
    found = getattr(loss, "__name__", _name(loss))
    if found != _LOSS or loss.__module__ != "transformers.loss.loss_utils":
        raise ValueError(
            f"fusedloss.patch_lm: the loss_function of {_name(model)} must be transformers' {_LOSS}, not "
            f"{found}"
        )


# ---- a call with labels --------------------------------------------------------------------------


def _without_logits(
    model: Any,
    forward: Callable[..., Any],
    options: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    # Looked up at each call, since either may have been replaced: by resize_token_embeddings, or LoRA.
    head = _head(model)
    _check_loss(model)
    name = _name(model)
    losses: list[Tensor] = []

    def loss(logits: Any, labels: Any, vocab_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(logits, Unmade):
            raise TypeError(
                f"fusedloss.patch_lm: what {name} gives its loss_function is a {_name(logits)}, and not "
                "what its output embedding returned"
            )
        losses.append(_loss(options, logits, labels, vocab_size, *args, **kwargs))
        return losses[-1]

    def project(hidden: Tensor, loss: Any = None) -> Any:
        if loss is None:
            return Unmade(name, head, hidden)
        return loss(hidden, head.weight, linear_bias=head.bias)

    before = model.__dict__.get("_loss_function")
    model.loss_function = loss
    head.__dict__["forward"] = project
    try:
        output = forward(model, *args, **kwargs)
    finally:
        head.__dict__.pop("forward")
        model.__dict__.pop("_loss_function")
        if before is not None:
            model._loss_function = before
    if not losses:
        raise RuntimeError(
            f"fusedloss.patch_lm: {name} got labels and did not call its loss_function"
        )
    if isinstance(output, tuple):
        return tuple(None if isinstance(part, Unmade) else part for part in output)
    unmade = [
        f.name for f in dataclasses.fields(output) if isinstance(getattr(output, f.name), Unmade)
    ]
    return dataclasses.replace(output, **dict.fromkeys(unmade))


def _loss(
    options: dict[str, Any],
    logits: Unmade,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers.loss.loss_utils.ForCausalLMLoss, which takes any other keyword too."""
    hidden, head = logits.hidden, logits.head
    if vocab_size is not None and vocab_size != head.out_features:
        raise ValueError(
            f"fusedloss.patch_lm: {logits.owner} has a vocabulary of {vocab_size}, and an output embedding "
            f"for {head.out_features}"
        )
    target = labels if shift_labels is None else shift_labels
    assert target is not None
    if shift_labels is not None:
        target = target.reshape(hidden.shape[:-1])
    loss = functools.partial(
        functional.linear_cross_entropy,
        target=target.to(hidden.device),
        num_items=num_items_in_batch,
        shift=1 if shift_labels is None else 0,
        ignore_index=ignore_index,
        logit_scale=logits.scale,
        softcap=logits.cap,
        **options,
    )
    # Through the head's __call__, whose hooks may have to gather the weight first: FSDP2's do, and free it
    # again when the head returns.
    device = hidden.device.type
    if torch.is_autocast_enabled(device) or hidden.dtype in (torch.float32, torch.float64):
        return head(hidden, loss=loss)  # type: ignore[no-any-return]
    # As transformers' loss, the result is float32 of logits in low precision; that is autocast's too.
    with torch.autocast(device, hidden.dtype):
        return head(hidden, loss=loss)  # type: ignore[no-any-return]


class Unmade:
    """Stands for the logits of a call, and notes what the model does to them.

    They would be ``scale * x``, or ``cap * tanh(scale * x / cap)``, where ``x`` is what the layer makes of
    the hidden states.
    """

    def __init__(
        self,
        owner: str,
        head: nn.Linear,
        hidden: Tensor,
        inner: float = 1.0,
        cap: float | None = None,
    ) -> None:
        self.owner, self.head, self.hidden, self.cap = owner, head, hidden, cap
        self._inner = inner  # what x is multiplied by, before tanh if there is one
        self.scale = inner if cap is None else inner * cap
        self.shape = torch.Size((*hidden.shape[:-1], head.out_features))
        self.dtype, self.device = hidden.dtype, hidden.device

    def _times(self, factor: Any, operation: str) -> Unmade:
        if not isinstance(factor, int | float):
            raise _unknown(self, f"{operation} by a {_name(factor)}")
        inner, cap = self._inner, self.cap
        if cap is None:
            inner *= factor
        else:
            cap *= factor
        return Unmade(self.owner, self.head, self.hidden, inner, cap)

    def __mul__(self, factor: Any) -> Unmade:
        return self._times(factor, "multiplication")

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Unmade:
        if not isinstance(divisor, int | float):
            raise _unknown(self, f"division by a {_name(divisor)}")
        return self._times(1 / divisor, "division")

    def tanh(self) -> Unmade:
        if self.cap is not None:
            raise _unknown(self, "tanh, twice")
        return Unmade(self.owner, self.head, self.hidden, self._inner, 1.0)

    def float(self) -> Unmade:
        return self

    def contiguous(self) -> Unmade:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(self, name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.tanh and not kwargs:
            return args[0].tanh()
        unmade = next(part for part in tree_leaves((args, kwargs)) if isinstance(part, Unmade))
        raise _unknown(unmade, getattr(function, "__name__", str(function)))


def _unknown(logits: Unmade, operation: str) -> RuntimeError:
    return RuntimeError(
        f"fusedloss.patch_lm: {logits.owner} applies {operation} to its logits, and the loss without logits "
        "knows a number as a factor, and softcapping"
    )


def _refuse(name: str) -> Any:
    def refused(self: Unmade, *args: Any) -> Any:
        raise _unknown(self, name)

    return refused


# Python looks operators up in the class. Of those in place, another name for the logits would not know.
for _operator in (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "imul", "itruediv", "rtruediv", "pow", "neg"),
    *("matmul", "rmatmul", "getitem", "setitem", "len", "iter", "bool"),
):
    setattr(Unmade, f"__{_operator}__", _refuse(_operator))
