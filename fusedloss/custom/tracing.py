"""From a Python function to formulas: traced with symbols, differentiated, with shared subexpressions.

SymPy must not expand products: ``3 * x - 3 * y`` loses digits by cancellation, and ``3 * (x - y)``
does not.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import sympy
from sympy.core.parameters import distribute
from torch import Tensor

from . import primitives, row_primitives
from .loss import INPUTS, as_float
from .primitives import Expr
from .row_primitives import CLASSES

# Losses need less than a tenth of either.
_DEEPEST = 64  # levels of nested primitives and operators
_LONGEST = 100_000  # primitives and operators of a slope, written out


@dataclass(frozen=True)
class Family:
    """What the definitions of a kind of losses have in common."""

    decorator: str
    signature: str  # an example
    reserved: tuple[str, ...]  # keywords of each call
    names: tuple[str, ...]  # further keywords of the tensors, in order


POINTWISE = Family(
    "pointwise_loss",
    "input, target, *, scale=1.0",
    ("reduction", "weight", "clip_grad"),
    INPUTS,
)


@dataclass(frozen=True)
class Program:
    """Formulas in the order in which a kernel computes them. Symbols named c are numbers of a call,
    those named t of an element."""

    constants: tuple[tuple[Expr, Expr], ...]  # symbol, formula of the parameters
    shared: tuple[tuple[Expr, Expr], ...]  # symbol, formula that several others use
    results: tuple[Expr, ...]


@dataclass(frozen=True)
class Definition:
    """What a custom loss's function has defined."""

    name: str
    arguments: tuple[str, ...]  # the function's names for its inputs
    inputs: tuple[Expr, ...]
    parameters: dict[str, Expr]  # by name, in order
    defaults: dict[str, float]
    value: Expr

    @property
    def identifier(self) -> str:
        """The name for sources and file names, without characters that could do harm there."""
        return re.sub(r"\W+", "_", self.name, flags=re.ASCII).strip("_")[:40] or "loss"

    def text(self, e: Expr) -> str:
        return " ".join(str(e).split())

    def _hoist(self, results: list[Expr]) -> tuple[tuple[tuple[Expr, Expr], ...], list[Expr]]:
        """Replaces subexpressions of parameters alone by constants."""
        parameters = set(self.parameters.values())
        constants: dict[Expr, Expr] = {}  # formula: symbol

        def is_constant(e: Expr) -> bool:
            return (
                isinstance(e, sympy.Expr) and bool(e.free_symbols) and e.free_symbols <= parameters
            )

        def constant(e: Expr) -> Expr:
            return constants.setdefault(e, sympy.Symbol(f"c{len(constants)}", real=True))

        rewritten = [hoisted(e, is_constant, constant) for e in results]
        return tuple((symbol, e) for e, symbol in constants.items()), rewritten


@dataclass(frozen=True)
class Traced(Definition):
    """A loss as formulas."""

    def text(self, e: Expr) -> str:
        """The first two inputs have the names input and target in it."""
        later = zip(self.inputs[2:], self.arguments[2:], strict=True)
        with distribute(False):
            named = e.xreplace({symbol: sympy.Symbol(name, real=True) for symbol, name in later})
        return super().text(named)

    @functools.cached_property
    def slopes(self) -> tuple[Expr, ...]:
        """The derivatives with respect to the inputs."""
        with distribute(False):
            return tuple(
                primitives.canonical(primitives.derivative(self.value, symbol))
                for symbol in self.inputs
            )

    @functools.cached_property
    def kernel(self) -> Program:
        """Value and slopes, in primitives that kernels have."""
        with distribute(False):
            # Before _hoist(), which merges parameters, and so could hide common subexpressions.
            value, *slopes = map(primitives.attached, (self.value, *self.slopes))
            shared, results = _shared(primitives.lowered(value), *self._lowered(slopes))
            # Shared formulas of parameters alone are put back, so that _hoist() finds them.
            of_call: dict[Expr, Expr] = {}
            of_element: dict[Expr, Expr] = {}
            for symbol, e in shared:
                formula = e.xreplace(of_call)
                depends = formula.free_symbols - set(self.parameters.values())
                (of_element if depends else of_call)[symbol] = formula
            formulas = [*of_element.values(), *(e.xreplace(of_call) for e in results)]
            constants, formulas = self._hoist(formulas)
        count = len(of_element)
        named = zip(of_element, formulas[:count], strict=True)
        return Program(constants, tuple(named), tuple(formulas[count:]))

    @functools.cached_property
    def reference(self) -> Program:
        """The value alone, as it was written."""
        with distribute(False):
            constants, results = self._hoist([self.value])
        return Program(constants, (), tuple(results))

    @functools.cached_property
    def reference_slopes(self) -> Program:
        """The slopes, in the form that kernels compute."""
        with distribute(False):
            constants, results = self._hoist(self._lowered(self.slopes))
        return Program(constants, (), tuple(results))

    def _lowered(self, slopes: Iterable[Expr]) -> list[Expr]:
        slopes = [primitives.lowered(slope) for slope in slopes]
        if max(map(_length, slopes)) > _LONGEST:
            _refuse_depth(self.name)
        return list(map(_factored, slopes))


def hoisted(e: Expr, is_ours: Callable[[Expr], bool], symbol: Callable[[Expr], Expr]) -> Expr:
    """The formula with symbols for its subexpressions that are ours."""

    @functools.cache
    def rewrite(e: Expr) -> Expr:
        if is_ours(e):
            return symbol(e)
        if not e.args:
            return e
        args = list(e.args)
        if isinstance(e, sympy.Mul | sympy.Add):
            # Numbers are merged with ours beside them; a sign stays outside.
            ours = [a for a in args if is_ours(a)]
            if ours:
                numbers = [a for a in args if a.is_number and a != -1]
                args = [a for a in args if a not in ours and a not in numbers]
                args.append(e.func(*ours, *numbers))
        return e.func(*map(rewrite, args))

    return rewrite(e)


def _factored(e: Expr) -> Expr:
    """a b x + a b y as a b (x + y). Not inside of primitives and conditions, which the value may share.
    Not for a single common factor or a number: one product less is not worth a lost digit."""
    if e.is_Mul:
        return e.func(*map(_factored, e.args))
    if not e.is_Add:
        return e
    terms = {term: _factors(term) for term in map(_factored, e.args)}
    while True:
        pairs = itertools.combinations(terms.values(), 2)
        most = max((_in_both(a, b) for a, b in pairs), key=len, default={})
        if len(most) < 2:
            return sympy.Add(*terms)
        common = sympy.Mul(*(base**exponent for base, exponent in most.items()))
        has = [term for term, factors in terms.items() if most.items() < factors.items()]
        product = common * sympy.Add(*(term / common for term in has))
        terms = {term: factors for term, factors in terms.items() if term not in has}
        terms[product] = _factors(product)


def _factors(term: Expr) -> dict[Expr, Expr]:
    """The factors of a term without numbers, as base and exponent."""
    powers = term.as_powers_dict().items()
    return {base: exponent for base, exponent in powers if not base.is_number}


def _in_both(a: dict[Expr, Expr], b: dict[Expr, Expr]) -> dict[Expr, Expr]:
    """The common factors of two terms; none, if one of the terms has no others."""
    same = {base: exponent for base, exponent in a.items() if b.get(base) == exponent}
    return same if len(same) < min(len(a), len(b)) else {}


def _shared(value: Expr, slope: Expr, *others: Expr) -> tuple[list[tuple[Expr, Expr]], list[Expr]]:
    """Common subexpressions, in order, and the formulas with symbols for them. Few calls need the
    slopes by other inputs than the first: they share factors with the value and the first slope, but
    add no product to them."""
    symbols = sympy.numbered_symbols("t")
    pieces = [piece for other in others for piece in _pieces(other)]
    terms = [term for piece in pieces for term in sympy.Add.make_args(piece)]
    factors = [factor for term in terms for factor in sympy.Mul.make_args(term)]
    # Conditions have no exponent.
    bases = [f.as_base_exp()[0] if isinstance(f, sympy.Expr) else f for f in factors]
    bases = [base for base in bases if base.args]
    shared, [value, slope, *reduced] = _repeated([value, slope, *bases], symbols)
    known = dict(zip(bases, reduced, strict=True))
    more, found = _repeated([other.xreplace(known) for other in others], symbols)
    return shared + more, [value, slope, *found]


def _pieces(e: Expr) -> Iterator[Expr]:
    """What a Where chooses from, and its conditions."""
    if isinstance(e, primitives.Where):
        for arg in e.args:
            yield from _pieces(arg)
    else:
        yield e


def _repeated(
    formulas: list[Expr], symbols: Iterator[Expr]
) -> tuple[list[tuple[Expr, Expr]], list[Expr]]:
    """Repeated subexpressions, in order, and the formulas with symbols for them."""
    shared: list[tuple[Expr, Expr]] = []
    while True:  # one pass may make products equal without sharing them
        found, formulas = sympy.cse(formulas, symbols)
        if not found:
            return shared, formulas
        shared += found


def definition(function: Callable[..., Any]) -> Any:
    """The function that has the definition's name, text and module: a partial's function, or itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    name = getattr(definition(function), "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


# ---- the arguments while tracing -----------------------------------------------------------------

# Names that PyTorch has for tensors, and that make no sense for a symbol.
_OF_TENSORS = frozenset(
    (
        *("all", "amax", "amin", "any", "argmax", "argmin", "cumsum", "dim", "dtype", "item"),
        *("median", "nansum", "normalize", "numel", "prod", "reshape", "shape", "size", "softmin"),
        *("sort", "std", "T", "topk", "view", "var"),
    )
)
_NO_TENSOR = (
    "no tensor is part of a formula: pass it as input, target or weight, numbers as parameters"
)
_NOT_OF_SYMBOLS = (
    "a function of math or numpy does not take symbols: use the functions of fusedloss.math"
)
_OF_REDUCTION = "a pointwise_loss returns one element's value, and the caller passes reduction="


def instead_of(name: str) -> str:
    """What to write instead of a function of that name."""
    from fusedloss import math

    if name in row_primitives.WORDS:
        return f"in a row_loss write fusedloss.math.{name}; {_OF_REDUCTION}"
    if name in math.__all__:
        return f"write fusedloss.math.{name}"
    if name in _OF_TENSORS:
        words = ", ".join(row_primitives.WORDS)
        return f"{name} takes a tensor, not a symbol: rows have {words}; {_OF_REDUCTION}"
    return f"fusedloss.math has no {name}; it has {_words()}"


def _words() -> str:
    from fusedloss import math

    return ", ".join(word for word in math.__all__ if word.islower())  # not Label and the like


def expression(x: Any) -> Expr:
    """SymPy's formula for a number or a traced formula."""
    if isinstance(x, Formula):
        return x.expression
    if isinstance(x, Tensor):
        raise TypeError(_NO_TENSOR)
    try:
        found = sympy.sympify(x, strict=True)
    except sympy.SympifyError:
        found = None
    if found is None or isinstance(x, bool) or not isinstance(found, sympy.Expr):
        raise TypeError(f"fusedloss.math takes numbers, symbols and tensors, not {x!r}")
    return found


def _operators(of: Callable[[Any, Any], Any]) -> Any:
    """The methods of an operator: with self as the left side, and as the right one."""

    def forward(self: Formula, other: Any) -> Formula:
        return Formula(of(self.expression, expression(other)))

    def reflected(self: Formula, other: Any) -> Formula:
        return Formula(of(expression(other), self.expression))

    return forward, reflected


def _compares(kind: Any) -> Any:
    def compare(self: Formula, other: Any) -> primitives.Condition:
        condition: primitives.Condition = kind(self.expression, expression(other))
        return condition

    return compare


class Formula:
    """A symbol, or a formula made of symbols, while a loss is traced: a SymPy expression whose operators
    do not simplify conditions, and whose errors say what to write instead."""

    __slots__ = ("expression",)
    __array_ufunc__ = None  # so that NumPy's numbers use a formula's operators

    def __init__(self, expression: Expr) -> None:
        self.expression = expression

    def _sympy_(self) -> Expr:
        return self.expression

    def __repr__(self) -> str:
        return str(self.expression)

    def __hash__(self) -> int:
        return hash(self.expression)

    __add__, __radd__ = _operators(operator.add)
    __sub__, __rsub__ = _operators(operator.sub)
    __mul__, __rmul__ = _operators(operator.mul)
    __truediv__, __rtruediv__ = _operators(operator.truediv)
    __pow__, __rpow__ = _operators(operator.pow)
    __lt__, __le__ = _compares(primitives.Less), _compares(primitives.LessEqual)
    __gt__, __ge__ = _compares(primitives.Greater), _compares(primitives.GreaterEqual)
    __eq__, __ne__ = _compares(primitives.Equal), _compares(primitives.NotEqual)

    def __neg__(self) -> Formula:
        return Formula(-self.expression)

    def __pos__(self) -> Formula:
        return self

    def __abs__(self) -> Formula:
        return Formula(primitives.Abs(self.expression))

    def __bool__(self) -> bool:
        raise TypeError(primitives.NO_TRUTH_VALUE)

    def __float__(self) -> float:
        raise TypeError(_NOT_OF_SYMBOLS)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            f"[{index}] takes a slice of a symbol, which stands for each element alike: pass the "
            "slices as tensors; in a row_loss fusedloss.math.at takes an element at the label"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols look for these
            raise AttributeError(name)
        raise AttributeError(f"a symbol has no .{name}: {instead_of(name)}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(isinstance(arg, Tensor) for arg in args):
            raise TypeError(_NO_TENSOR)
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"torch's {name}() does not take symbols: {instead_of(name)}")


# ---- tracing -------------------------------------------------------------------------------------


def trace(function: Callable[..., Any]) -> Traced:
    """The formulas of a loss.

    Raises:
        TypeError, ValueError: the function does not define a loss; the message says why, and what to
            write instead.
    """
    name = name_of(function)
    arguments, defaults = signature(function, name, POINTWISE)
    with distribute(False):
        # The name alone identifies a symbol, so that rewritten expressions compare equal.
        inputs = tuple(primitives.Input(name, real=True) for name in INPUTS[: len(arguments)])
        parameters, result = called(function, name, inputs, defaults)
        value = _checked(name, result, {*inputs, *parameters.values()})
    known = {key: default for key, default in defaults.items() if default is not None}
    return Traced(name, arguments, inputs, parameters, known, value)


def called(
    function: Callable[..., Any], name: str, inputs: Iterable[Expr], names: Iterable[str]
) -> tuple[dict[str, Expr], Any]:
    """The symbols of the parameters, by name, and what the function returns for symbols."""
    parameters = {key: sympy.Symbol(key, real=True) for key in names}
    given = {key: Formula(symbol) for key, symbol in parameters.items()}
    try:
        return parameters, function(*map(Formula, inputs), **given)
    except RecursionError:
        _refuse_depth(name)
    except Exception as error:
        raise _explained(name, error) from error


def signature(
    function: Callable[..., Any], name: str, family: Family
) -> tuple[tuple[str, ...], dict[str, float | None]]:
    """The names of the inputs, and the parameters' defaults by name; None: no default."""
    if not callable(function):
        raise TypeError(f"{family.decorator} takes a function, not {function!r}")
    form = f"def {name}({family.signature})"
    taken = (*family.reserved, *family.names)
    positional: list[str] = []
    defaults: dict[str, float | None] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{name}: *args and **kwargs cannot be traced; name every parameter: {form}"
            )
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(parameter.name)
            if parameter.default is not parameter.empty:
                raise TypeError(
                    f"{name}: {parameter.name!r} stands before the *, so it is a tensor and has no "
                    f"default; numbers are keywords, behind a *: {form}"
                )
            continue
        if parameter.name in taken:
            raise ValueError(
                f"{name}: every loss has a keyword {parameter.name!r} already; name yours otherwise"
            )
        default = None if parameter.default is parameter.empty else parameter.default
        if default is not None and (isinstance(default, bool) or not isinstance(default, Real)):
            raise TypeError(
                f"{name}: the default of {parameter.name!r} must be a number, not {default!r}"
            )
        defaults[parameter.name] = (
            None if default is None else as_float(name, parameter.name, default)
        )
    if not 1 <= len(positional) <= len(INPUTS):
        raise TypeError(
            f"{name}: a loss takes 1 to {len(INPUTS)} tensors, not {len(positional)} of them: {form}"
        )
    for place, argument in enumerate(positional):
        if argument in taken and family.names[place : place + 1] != (argument,):
            first = "input comes first, then target, and " if family.names else ""
            *most, last = family.reserved
            raise ValueError(
                f"{name}: {argument!r} cannot be the name of tensor {place}: {first}"
                f"{', '.join(most)} and {last} are options of every loss: {form}"
            )
    return tuple(positional), defaults


def _explained(name: str, error: Exception) -> Exception:
    """The error to raise for one that occurred while tracing: it says what to change in the loss."""
    said = str(error)
    if "truth value of" in said:
        return TypeError(
            f"{name}: an if, and, or, not, min, max or chained comparison asks a symbol whether it "
            "is true, which depends on the element: write fusedloss.math.where(condition, a, b), "
            "maximum or minimum, and join conditions by &, | and ~"
        )
    if "ufunc" in said:
        said = _NOT_OF_SYMBOLS
    known = type(error) in vars(builtins).values() and not isinstance(error, AttributeError)
    kind = type(error) if known else TypeError
    return kind(f"{name} cannot be traced: {said}")


def _checked(name: str, result: Any, known: set[Expr]) -> Expr:
    """The value, in primitives."""
    if isinstance(result, tuple | list):
        raise TypeError(f"{name} returns {len(result)} values: return one, the element's loss")
    value = formula(name, result, {*known, CLASSES})
    of_rows = sorted(map(row_primitives.spoken, row_primitives.words_in(value)))
    if value.has(CLASSES):
        of_rows.append("classes")
    if of_rows:
        raise TypeError(
            f"{name}: {of_rows[0]} takes a row of classes, and a pointwise loss sees one element: "
            "write it as a fusedloss.row_loss"
        )
    return value


def formula(name: str, result: Any, known: set[Expr]) -> Expr:
    """What a definition returns, in primitives."""
    if result is None:
        raise TypeError(f"{name} returns None: write return in front of the value")
    if isinstance(result, Formula):
        result = result.expression
    if isinstance(result, sympy.logic.boolalg.Boolean) and not isinstance(result, sympy.Symbol):
        raise TypeError(
            f"{name} returns a condition: write fusedloss.math.where({result}, 1.0, 0.0)"
        )
    if not isinstance(result, sympy.Expr | int | float):
        raise TypeError(f"{name} returns {result!r}: return a formula of its tensors")
    if _depth(result) > _DEEPEST:
        _refuse_depth(name)
    value = primitives.canonical(sympy.sympify(result))
    strange = value.free_symbols - known
    if strange:
        raise ValueError(
            f"{name}: unknown symbol {', '.join(sorted(map(str, strange)))}; make it a parameter"
        )
    if not primitives.inputs_in(value):
        raise ValueError(f"{name} is {value}, for any tensors: it has nothing to learn")
    for node in sympy.preorder_traversal(value):
        if node.has(sympy.I, sympy.zoo, sympy.nan):
            raise ValueError(f"{name} is no real number: {value}")
        if node.is_Number and node.is_finite and primitives.overflows(node):
            raise ValueError(f"{name}: {sympy.N(node, 3)} is beyond the largest float64, 1.8e308")
        if isinstance(node, sympy.Function) and not isinstance(node, primitives.Primitive):
            raise TypeError(
                f"{name}: {node.func} is not a function of fusedloss.math, which has {_words()}"
            )
    return value


def _refuse_depth(name: str) -> NoReturn:
    raise ValueError(
        f"{name} nests too many functions and operators: at most {_DEEPEST} levels, and {_LONGEST} in "
        "all in a slope that is written out"
    ) from None


def _depth(e: Any) -> int:
    """How many levels of primitives and operators a formula has, counted up to _DEEPEST."""
    depth, level = 0, {e}
    while level and depth <= _DEEPEST:
        depth, level = depth + 1, {arg for node in level for arg in getattr(node, "args", ())}
    return depth


def _length(e: Expr, known: dict[Expr, int] | None = None) -> int:
    """How many primitives, operators and symbols a formula has if nothing is shared."""
    known = {} if known is None else known
    if e not in known:
        known[e] = 1 + sum(_length(arg, known) for arg in e.args)
    return known[e]
