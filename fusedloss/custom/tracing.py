"""From a Python function to formulas: traced with symbols, differentiated, shared.

SymPy must not multiply out: ``3 * (x - y)`` keeps its digits where ``3 * x - 3 * y`` cancels.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import sympy
from sympy.core.parameters import distribute

from . import words
from .words import INPUT, TARGET, Expr

RESERVED = ("reduction", "weight", "clip_grad")  # keywords that every loss has


@dataclass(frozen=True)
class Program:
    """Formulas as a kernel computes them, in order. Symbols named c are numbers of a call, t of an
    element."""

    constants: tuple[tuple[Expr, Expr], ...]  # symbol, formula of the parameters
    shared: tuple[tuple[Expr, Expr], ...]  # symbol, formula that several others use
    results: tuple[Expr, ...]


@dataclass(frozen=True)
class Traced:
    """A loss as formulas."""

    name: str
    input: Expr
    target: Expr
    parameters: dict[str, Expr]  # by name, in order
    defaults: dict[str, float]
    value: Expr

    @property
    def identifier(self) -> str:
        """The name in sources and file names, where any other text could do harm."""
        return re.sub(r"\W+", "_", self.name, flags=re.ASCII).strip("_")[:40] or "loss"

    @cached_property
    def slopes(self) -> tuple[Expr, Expr]:
        """The derivatives with respect to input and target."""
        with distribute(False):
            of_input, of_target = (
                words.canonical(self.value.diff(symbol)) for symbol in (self.input, self.target)
            )
        return of_input, of_target

    @cached_property
    def kernel(self) -> Program:
        """Value and both slopes, in the words that kernels have."""
        with distribute(False):
            # Before _hoist(): a parameter that joined another would hide what is the same without.
            shared, results = _shared(words.lowered(self.value), *self._lowered_slopes())
            # What is of parameters alone goes back into the formulas, for _hoist() to find.
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

    @cached_property
    def reference(self) -> Program:
        """The value alone, as it was written."""
        with distribute(False):
            constants, results = self._hoist([self.value])
        return Program(constants, (), tuple(results))

    @cached_property
    def reference_slopes(self) -> Program:
        """Both slopes, as kernels have them."""
        with distribute(False):
            constants, results = self._hoist(self._lowered_slopes())
        return Program(constants, (), tuple(results))

    def _lowered_slopes(self) -> list[Expr]:
        return [_factored(words.lowered(slope)) for slope in self.slopes]

    def _hoist(self, results: list[Expr]) -> tuple[tuple[tuple[Expr, Expr], ...], list[Expr]]:
        """Takes what depends on parameters alone out of the formulas."""
        parameters = set(self.parameters.values())
        constants: dict[Expr, Expr] = {}  # formula: symbol

        def is_constant(e: Expr) -> bool:
            return (
                isinstance(e, sympy.Expr) and bool(e.free_symbols) and e.free_symbols <= parameters
            )

        def constant(e: Expr) -> Expr:
            return constants.setdefault(e, sympy.Symbol(f"c{len(constants)}", real=True))

        def rewrite(e: Expr) -> Expr:
            if is_constant(e):
                return constant(e)
            if not e.args:
                return e
            args = list(e.args)
            if isinstance(e, sympy.Mul | sympy.Add):
                # Numbers join the parameters that stand beside them; a sign stays outside.
                ours = [a for a in args if is_constant(a)]
                if ours:
                    numbers = [a for a in args if a.is_number and a != -1]
                    args = [a for a in args if a not in ours and a not in numbers]
                    args.append(e.func(*ours, *numbers))
            return e.func(*map(rewrite, args))

        rewritten = [rewrite(e) for e in results]
        return tuple((symbol, e) for e, symbol in constants.items()), rewritten


def _factored(e: Expr) -> Expr:
    """a b x + a b y as a b (x + y). Not inside of words and conditions, where the value has the same;
    nor for one common factor, or beside a number: a saved product is not worth a lost digit."""
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
    """The powers of which a term is the product, but for numbers: base, exponent."""
    powers = term.as_powers_dict().items()
    return {base: exponent for base, exponent in powers if not base.is_number}


def _in_both(a: dict[Expr, Expr], b: dict[Expr, Expr]) -> dict[Expr, Expr]:
    """The factors of two terms that are the same; none, if they are all that one of them has."""
    same = {base: exponent for base, exponent in a.items() if b.get(base) == exponent}
    return same if len(same) < min(len(a), len(b)) else {}


def _shared(
    value: Expr, slope: Expr, target_slope: Expr
) -> tuple[list[tuple[Expr, Expr]], list[Expr]]:
    """What several formulas use, in order, and the formulas with symbols for it. Few calls want the
    target's slope: it shares factors with the others, but no product is formed for its sake."""
    symbols = sympy.numbered_symbols("t")
    terms = sympy.Add.make_args(target_slope)
    factors = [factor for term in terms for factor in sympy.Mul.make_args(term)]
    bases = [base for base in (factor.as_base_exp()[0] for factor in factors) if base.args]
    shared, [value, slope, *reduced] = _repeated([value, slope, *bases], symbols)
    target_slope = target_slope.xreplace(dict(zip(bases, reduced, strict=True)))
    more, [target_slope] = _repeated([target_slope], symbols)
    return shared + more, [value, slope, target_slope]


def _repeated(
    formulas: list[Expr], symbols: Iterator[Expr]
) -> tuple[list[tuple[Expr, Expr]], list[Expr]]:
    """What stands in formulas more than once, in order, and the formulas with symbols for it."""
    shared: list[tuple[Expr, Expr]] = []
    while True:  # one pass leaves products that it has made equal
        found, formulas = sympy.cse(formulas, symbols)
        if not found:
            return shared, formulas
        shared += found


def definition(function: Callable[..., Any]) -> Any:
    """What has the name, the text and the module of a definition: the function of which it is a
    partial one, or itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Callable[..., Any]) -> str:
    name = getattr(definition(function), "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def trace(function: Callable[..., Any]) -> Traced:
    """The formulas of a loss.

    Raises:
        TypeError, ValueError: the function is no definition of a loss; the message says why, and
            what to write instead.
    """
    name = _name(function)
    defaults = _signature(function, name)
    with distribute(False):
        # Apart from each other by name alone: an expression is found again where it is rewritten.
        input, target = sympy.Symbol(INPUT, real=True), sympy.Symbol(TARGET, real=True)
        parameters = {key: sympy.Symbol(key, real=True) for key in defaults}
        try:
            result = function(input, target, **parameters)
        except Exception as error:
            raise _explained(name, error) from error
        value = _checked(name, result, {input, target, *parameters.values()})
    given = {key: default for key, default in defaults.items() if default is not None}
    return Traced(name, input, target, parameters, given, value)


def _signature(function: Callable[..., Any], name: str) -> dict[str, float | None]:
    """The parameters by name, with their defaults; None: there is none."""
    if not callable(function):
        raise TypeError(f"pointwise_loss takes a function, not {function!r}")
    form = f"def {name}(input, target, *, scale=1.0)"
    positional, defaults = 0, {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{name}: *args and **kwargs cannot be traced; name every parameter: {form}"
            )
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional += 1
            if positional > 2:
                raise TypeError(
                    f"{name}: {parameter.name!r} is a third positional argument; a loss takes two, "
                    f"and its parameters as keywords, behind a *: {form}"
                )
            if parameter.default is not parameter.empty:
                raise TypeError(
                    f"{name}: {parameter.name!r} is a tensor and has no default: {form}"
                )
            continue
        if parameter.name in (*RESERVED, INPUT, TARGET):
            raise ValueError(
                f"{name}: every loss has a keyword {parameter.name!r} already; name yours otherwise"
            )
        default = None if parameter.default is parameter.empty else parameter.default
        if default is not None and (isinstance(default, bool) or not isinstance(default, Real)):
            raise TypeError(
                f"{name}: the default of {parameter.name!r} is to be a number, not {default!r}"
            )
        defaults[parameter.name] = None if default is None else float(default)
    if positional != 2:
        raise TypeError(f"{name}: a loss takes input and target, not {positional} of them: {form}")
    return defaults


def _explained(name: str, error: Exception) -> Exception:
    """What went wrong in tracing, in the words of whoever wrote the loss."""
    from fusedloss import math

    said = str(error)

    def write(word: str) -> str:
        instead = {"where": "where(condition, a, b)"}.get(word, f"{word}(...)")
        return f"write fusedloss.math.{instead}" if word in math.__all__ else ""

    if "truth value of" in said:
        return TypeError(
            f"{name}: an if, and, or, not, min, max or chained comparison asks a symbol whether it "
            "is true, which depends on the element: write fusedloss.math.where(condition, a, b), "
            "maximum or minimum, and join conditions by &, | and ~"
        )
    torch_function = re.match(r"(\w+)\(\)(?:: argument|: expected| received|:? missing)", said)
    if torch_function or "tensor" in said.lower():
        word = torch_function[1] if torch_function else ""
        called = f"torch's {word}()" if word else "a torch function or tensor"
        advice = write(word) or "write it in the words of fusedloss.math, and numbers as parameters"
        return TypeError(f"{name}: {called} does not take symbols: {advice} ({said})")
    method = re.search(r"has no attribute '(\w+)'", said)
    if isinstance(error, AttributeError) and method:
        word = method[1]
        advice = write(word) or (
            "a loss is of one element, and reduction is its caller's keyword: return the element's "
            "value"
            if word
            in ("mean", "sum", "item", "shape", "size", "dim", "numel", "max", "min", "dtype")
            else "write it in the words of fusedloss.math"
        )
        return TypeError(f"{name}: a symbol has no .{word}: {advice}")
    numpy_function = re.search(r"no callable (\w+) method|ufunc '?(\w+)", said)
    if numpy_function or "Cannot convert expression to float" in said:
        word = next(filter(None, numpy_function.groups()), "") if numpy_function else ""
        advice = write(word) or "write it in the words of fusedloss.math"
        return TypeError(f"{name}: a function of math or numpy does not take symbols: {advice}")
    kind = type(error) if type(error) in vars(builtins).values() else TypeError
    return kind(f"{name} cannot be traced: {said}")


def _checked(name: str, result: Any, known: set[Expr]) -> Expr:
    """The value, in our words."""
    if result is None:
        raise TypeError(f"{name} returns None: write return in front of the value")
    if isinstance(result, tuple | list):
        raise TypeError(f"{name} returns {len(result)} values: return one, the element's loss")
    if isinstance(result, sympy.logic.boolalg.Boolean) and not isinstance(result, sympy.Symbol):
        raise TypeError(
            f"{name} returns a condition: write fusedloss.math.where({result}, 1.0, 0.0)"
        )
    if not isinstance(result, sympy.Expr | int | float):
        raise TypeError(f"{name} returns {result!r}: return a formula of input and target")
    value = words.canonical(sympy.sympify(result))
    strange = value.free_symbols - known
    if strange:
        raise ValueError(
            f"{name}: unknown symbol {', '.join(sorted(map(str, strange)))}; make it a parameter"
        )
    if not {str(s) for s in value.free_symbols} & {INPUT, TARGET}:
        raise ValueError(f"{name} is {value}, whatever input and target: it has nothing to learn")
    for node in sympy.preorder_traversal(value):
        if node.has(sympy.I, sympy.zoo, sympy.nan):
            raise ValueError(f"{name} is no real number: {value}")
        if isinstance(node, sympy.Function) and not isinstance(node, words.Word):
            raise TypeError(
                f"{name}: {node.func} is none of the functions of fusedloss.math, which are "
                f"{', '.join(_words())}"
            )
    return value


def _words() -> list[str]:
    from fusedloss import math

    return math.__all__
