"""Prints formulas as code: a C++ struct or a Triton function for the kernels, and PyTorch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.parameters import distribute
from torch import Tensor

from . import primitives, row_primitives
from .loss import INPUTS
from .primitives import INPUT, TARGET, Expr
from .row_tracing import TracedRows
from .tracing import Definition, Program, Traced

if TYPE_CHECKING:
    from .walks import RowProgram

# The inputs' names in code.
_NAMES = dict(zip(INPUTS, ("x", "y", *(f"x{i}" for i in range(2, len(INPUTS)))), strict=True))


def _names(traced: Traced) -> list[str]:
    return [_NAMES.get(symbol.name, symbol.name) for symbol in traced.inputs]


class Printer:
    """Prints formulas with everything but names and calls in brackets.

    A sum that has both elements as terms starts with them, so that ``input - target`` is computed
    before a smaller term is added: the difference of two close numbers is exact.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names  # of symbols that are printed under another name
        self.printed: dict[Expr, str] = {}

    def __call__(self, e: Expr) -> str:
        if e not in self.printed:
            self.printed[e] = self._print(e)
        return self.printed[e]

    def _print(self, e: Expr) -> str:
        for kind in type(e).__mro__:
            method = getattr(self, f"_{kind.__name__}", None)
            if method is not None:
                return str(method(e))
        raise TypeError(f"no way to print {e!r}")  # tracing has refused such a formula

    def number(self, x: float) -> str:
        raise NotImplementedError

    def applied(self, name: str, *args: str) -> str:
        return f"{name}({', '.join(args)})"

    def call(self, name: str, args: Sequence[Expr]) -> str:
        return self.applied(name, *map(self, args))

    def _Symbol(self, e: Expr) -> str:
        return self.names.get(e.name, e.name)

    def _Number(self, e: Expr) -> str:
        return self.number(float(e))

    _NumberSymbol = _Number

    def _Add(self, e: Expr) -> str:
        def is_plain(term: Expr) -> bool:
            symbol = term.as_coeff_Mul()[1]
            return bool(symbol.is_Symbol and symbol.name in (INPUT, TARGET))

        several = sum(map(is_plain, e.args)) > 1

        def rank(term: Expr) -> tuple[bool, bool, str]:
            return not (several and is_plain(term)), _is_negative(term), sympy.srepr(term)

        first, *rest = sorted(e.args, key=rank)
        text = self(first)
        for term in rest:
            negative = _is_negative(term)
            text = f"{text} {'-' if negative else '+'} {self(-term if negative else term)}"
        return f"({text})"

    def _Mul(self, e: Expr) -> str:
        above, below = [], []
        negative = False
        for factor in e.args:
            if factor == -1:
                negative = not negative
            elif factor.is_Pow and factor.exp.is_Integer and factor.exp < 0:
                below.append(1 / factor)
            else:
                above.append(factor)
        text = " * ".join(map(self, above)) if above else self.number(1.0)
        if below:
            text = self.quotient(text, " * ".join(map(self, below)))
        return f"(-({text}))" if negative else f"({text})"

    def _Pow(self, e: Expr) -> str:
        base, exponent = self(e.base), int(e.exp)
        product = " * ".join([base] * abs(exponent))
        return f"({product})" if exponent > 0 else self.quotient(self.number(1.0), product)

    def quotient(self, above: str, below: str) -> str:
        return f"(({above}) / ({below}))"

    def _Comparison(self, e: Expr) -> str:
        return f"({self(e.lhs)} {e.operator} {self(e.rhs)})"

    def _Condition(self, e: Expr) -> str:
        return self.call(e.operation, e.args)


def _is_negative(e: Expr) -> bool:
    return bool(e.as_coeff_Mul()[0].is_negative)


# ---- kernels -------------------------------------------------------------------------------------


class _Kernel(Printer):
    """In the functions of csrc/math, which the Triton backend mirrors."""

    def _Primitive(self, e: Expr) -> str:
        return self.call(e.func.__name__.lower(), e.args)

    def _Where(self, e: Expr) -> str:
        return self.call("select", e.args)

    def _Relu(self, e: Expr) -> str:
        return self.applied("clamp_min", self(e.args[0]), self.number(0.0))

    def _reciprocal(self, e: Expr) -> str:
        return self.quotient(self.number(1.0), self(e.args[0]))

    def _Power(self, e: Expr) -> str:
        base, exponent = e.args
        number = self.of_call(exponent)
        if number is None:
            return self.call("pow", e.args)
        return self.applied("power", self(base), number)

    def _PowerSlope(self, e: Expr) -> str:
        base, exponent, value = e.args
        return self.applied("power_slope", self(base), self(value), str(self.of_call(exponent)))

    def of_call(self, e: Expr) -> str | None:
        """Prints an exponent that is the same for all elements; None: it is not."""
        raise NotImplementedError


def _is_constant(e: Expr) -> bool:
    return bool(e.is_Symbol and e.name.startswith("c")) and not isinstance(e, primitives.Input)


# ---- C++ -----------------------------------------------------------------------------------------


class _Cpp(_Kernel):
    """Formulas of elements. T is a number or a SIMD register."""

    def _Mul(self, e: Expr) -> str:
        if isinstance(-e, primitives.Abs):
            return self.call("neg_abs", (-e).args)
        return super()._Mul(e)

    def number(self, x: float) -> str:
        return f"T({_cpp_number(x)})"

    def of_call(self, e: Expr) -> str | None:
        if e.is_number:
            return _cpp_number(float(e))  # a double
        return f"constants[{e.name[1:]}]" if _is_constant(e) else None


class _CppConstant(_Cpp):
    """Formulas of a call's parameters, in double."""

    def number(self, x: float) -> str:
        return f"double({_cpp_number(x)})"

    def _Power(self, e: Expr) -> str:
        return self.call("pow", e.args)


def _cpp_number(x: float) -> str:
    if math.isinf(x):
        return "INFINITY" if x > 0 else "-INFINITY"
    return repr(x)


def cpp(traced: Traced) -> str:
    """The struct that csrc/math/custom.h describes. Its last parameter bounds the slopes."""
    program = traced.kernel
    count = len(program.constants) + 1
    given = list(traced.parameters)
    usual = [f"{{{count - 1}, INFINITY}}", *_usual_exponents(traced)]
    of_call = _CppConstant({name: f"parameters[{i}]" for i, name in enumerate(given)})
    of_element = _Cpp(_NAMES)
    inputs = _names(traced)
    given_inputs = ", ".join(f"[[maybe_unused]] T {name}" for name in inputs)
    lines = [
        f"// {traced.identifier}: {traced.text(traced.value)}",
        f"struct Loss : CustomLoss<{len(inputs)}, {count}> {{",
        f"  static constexpr int kParameters = {len(given) + 1};",
        f"  static constexpr Usual kUsual[] = {{{', '.join(usual)}}};",
        "  FUSEDLOSS_HD static void prepare(const double* parameters, double* constants) {",
        *(
            f"    constants[{i}] = {of_call(formula)};"
            for i, (_, formula) in enumerate(program.constants)
        ),
        f"    constants[{count - 1}] = parameters[{len(given)}];",
        "  }",
        "  template <class T>",
        f"  FUSEDLOSS_HD EvalEach<T, {len(inputs)}> eval({given_inputs}) const {{",
        *(f"    const T c{i}(constants[{i}]);" for i in range(count - 1)),
        *(f"    const auto {symbol} = {of_element(e)};" for symbol, e in program.shared),
    ]
    value, *slopes = map(of_element, program.results)
    bounded = [f"bounded({slope}, constants[{count - 1}])" for slope in slopes]
    lines += [f"    return {{{value}, {{{', '.join(bounded)}}}}};", "  }", "};"]
    return "\n".join(lines) + "\n"


def _usual_exponents(traced: Traced) -> Iterator[str]:
    """The exponents for the loss's defaults, for which the compiler makes a faster kernel."""
    if traced.defaults.keys() != traced.parameters.keys():
        return
    program = traced.kernel
    numbers = host_constants(traced, program)(tuple(traced.defaults.values()))
    formulas = [*(e for _, e in program.shared), *program.results]
    powers = sympy.Tuple(*formulas).atoms(primitives.Power)
    for i, (symbol, _) in enumerate(program.constants):
        known = not math.isnan(numbers[i])  # nan equals nothing
        if known and any(power.args[1] == symbol for power in powers):
            yield f"{{{i}, {_cpp_number(numbers[i])}}}"


# ---- Triton --------------------------------------------------------------------------------------


class _Triton(_Kernel):
    """Formulas of blocks of elements and of 0-d constants, all of the type T."""

    def number(self, x: float) -> str:
        return f"tl.full((), {_python_number(x)}, T)"

    def applied(self, name: str, *args: str) -> str:
        return super().applied(f"primitives.{name}", *args)

    def quotient(self, above: str, below: str) -> str:
        return self.applied("divide", above, below)

    def of_call(self, e: Expr) -> str | None:
        return self(e) if e.is_number or _is_constant(e) else None


def _python_number(x: float) -> str:
    return f"float({str(x)!r})" if math.isinf(x) else repr(x)


def triton(traced: Traced) -> str:
    """A module with a function `loss` for the engine of fusedloss/backends/triton/pointwise.py. The
    function takes the kernel's constants, and the bound of the slopes."""
    program = traced.kernel
    of_element = _Triton(_NAMES)
    constants = [str(symbol) for symbol, _ in program.constants]
    value, *slopes = map(of_element, program.results)
    bounded = [of_element.applied("clamp", slope, "-clip", "clip") for slope in slopes]
    lines = [
        f"# {traced.identifier}: {traced.text(traced.value)}",
        "import triton",
        "import triton.language as tl",
        "",
        "from fusedloss.backends.triton import primitives",
        "",
        "",
        "@triton.jit",
        f"def loss({', '.join([*_names(traced), *constants, 'clip'])}):",
        "    T: tl.constexpr = x.dtype",
        *(f"    {symbol} = {of_element(e)}" for symbol, e in program.shared),
        f"    return {', '.join([value, *bounded])}",
    ]
    return "\n".join(lines) + "\n"


# ---- PyTorch -------------------------------------------------------------------------------------


class _Torch(Printer):
    """Formulas of tensors, with Python numbers as constants."""

    def __init__(self, names: Mapping[str, str], inputs: Iterable[str] = ()) -> None:
        super().__init__(names)
        self.inputs = ", ".join(inputs)

    def number(self, x: float) -> str:
        return _python_number(x)

    def _Primitive(self, e: Expr) -> str:
        return f"call({', '.join([e.func.__name__, *map(self, e.args)])})"

    def _Where(self, e: Expr) -> str:
        condition, yes, no = e.args
        branches = ", ".join(f"lambda {self.inputs}: {self(branch)}" for branch in (yes, no))
        return f"where({self(condition)}, {branches}, {self.inputs})"


class _TorchRows(_Torch):
    """Formulas of tensors whose last dimension is the classes. Row numbers have size 1 there."""

    def __init__(self, inputs: Mapping[Expr, str], elements: Collection[Expr]) -> None:
        super().__init__({}, inputs.values())
        self.of_input, self.elements = inputs, elements

    def _Input(self, e: Expr) -> str:
        return self.of_input.get(e, "classes")

    def _Where(self, e: Expr) -> str:
        """A branch gets its elements cut off where it is not taken. But its words are of all elements:
        where classes choose for themselves, it gets these as tensors too."""
        condition, *branches = e.args
        if not row_primitives.is_element(condition, self.elements):
            return super()._Where(e)
        words = [word for branch in branches for word in _outermost_words(branch)]
        held = {word: primitives.Input(f"{word}.", real=True) for word in words}
        names = {symbol: f"w{len(self.of_input) + i}" for i, symbol in enumerate(held.values())}
        shares = [s for word, s in held.items() if isinstance(word, row_primitives.Share)]
        inside = _TorchRows({**self.of_input, **names}, [*self.elements, *shares])
        with distribute(False):
            bodies = [inside(branch.xreplace(held)) for branch in branches]
        yes, no = (f"lambda {inside.inputs}: {body}" for body in bodies)
        given = ", ".join([*self.of_input.values(), *map(self, held)])
        return f"where({self(condition)}, {yes}, {no}, {given})"


def _outermost_words(e: Expr) -> Iterator[Expr]:
    if isinstance(e, row_primitives.Reduction | row_primitives.Share | row_primitives.At):
        yield e
    else:
        for arg in e.args:
            yield from _outermost_words(arg)


class _TorchConstant(_Torch):
    """Formulas of float64 tensors of one number, since Python's arithmetic raises on 1 / 0."""

    def number(self, x: float) -> str:
        return f"number({str(x)!r})"

    def _Where(self, e: Expr) -> str:
        return self.call("select", e.args)


def _call(primitive: Any, *args: Any) -> Any:
    like = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if like is None:
        args = tuple(torch.tensor(arg, dtype=torch.float64) for arg in args)
        return primitive.torch(*args).item()
    kind: Any = {"dtype": like.dtype, "device": like.device}
    tensors = (arg if isinstance(arg, Tensor) else torch.full((), arg, **kind) for arg in args)
    return primitive.torch(*tensors)


Branch = Callable[..., Any]


def _where(condition: Any, yes: Branch, no: Branch, *inputs: Any) -> Any:
    """Where a branch is not taken, it gets numbers without a graph: its gradient there may be infinite
    or nan, and must not reach anything else, in any order of differentiation."""
    if not isinstance(condition, Tensor):
        return yes(*inputs) if condition else no(*inputs)
    taken = _cut(condition, yes, inputs)
    other = _cut(~condition, no, inputs)
    like = inputs[0] if isinstance(inputs[0], Tensor) else condition.double()
    return torch.where(condition, _tensor(taken, like), _tensor(other, like))


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((), value)


def _cut(taken: Tensor, branch: Branch, inputs: Sequence[Any]) -> Any:
    def keep(t: Any) -> Any:
        return torch.where(taken, t, t.detach()) if isinstance(t, Tensor) else t

    return branch(*map(keep, inputs))


def _host(x: float) -> Tensor:
    """On the CPU, whatever the default device, since reading a number from a GPU waits for it."""
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def _logical_not(a: Any) -> Any:
    return ~a if isinstance(a, Tensor) else not a


_NAMESPACE: dict[str, Any] = {
    "call": _call,
    "where": _where,
    "number": lambda text: _host(float(text)),
    "select": torch.where,
    "logical_and": operator.and_,
    "logical_or": operator.or_,
    "logical_not": _logical_not,
    **{
        primitive.__name__: primitive
        for primitive in (*vars(primitives).values(), *vars(row_primitives).values())
        if isinstance(primitive, type) and issubclass(primitive, primitives.Primitive)
    },
}


def _constants_source(traced: Definition, program: Program | RowProgram) -> str:
    # Numbered, since a parameter may have the name of a function in the printed formula.
    names = {name: f"p{i}" for i, name in enumerate(traced.parameters)}
    formulas = map(_TorchConstant(names), (e for _, e in program.constants))
    return f"def constants({', '.join(names.values())}):\n    return [{', '.join(formulas)}]\n"


def _torch_source(
    traced: Definition, program: Program, inputs: Sequence[str], printer: _Torch
) -> str:
    """Two functions: ``constants(parameters...)`` and ``results(inputs..., constants...)``."""
    arguments = ", ".join([*inputs, *(str(symbol) for symbol, _ in program.constants)])
    results = map(printer, program.results)
    return (
        f"{_constants_source(traced, program)}\n"
        f"def results({arguments}):\n    return {', '.join(results)},\n"
    )


def _executed(traced: Definition, source: str) -> dict[str, Any]:
    namespace = dict(_NAMESPACE)
    exec(compile(source, f"<{traced.identifier}>", "exec"), namespace)  # noqa: S102 - printed above
    return namespace


Numbers = tuple[float, ...]
Compiled = Callable[[Sequence[Tensor], Numbers], Sequence[Tensor]]


def _cached(constants: Callable[..., list[Any]]) -> Callable[[Numbers], Numbers]:
    @functools.lru_cache(maxsize=64)
    def of(parameters: Numbers) -> Numbers:
        numbers = (_host(p) for p in parameters)
        return tuple(float(c) for c in constants(*numbers))

    return of


def host_constants(
    traced: Definition, program: Program | RowProgram
) -> Callable[[Numbers], Numbers]:
    """The constants of a kernel as a function of the parameters' numbers, computed in float64."""
    return _cached(_executed(traced, _constants_source(traced, program))["constants"])


def torch_function(traced: Traced, program: Program) -> Compiled:
    """The formulas as a function of the inputs and the parameters' numbers. Its results have input's
    shape."""
    names = _names(traced)
    source = _torch_source(traced, program, names, _Torch(_NAMES, names))
    namespace = _executed(traced, source)
    constants, results = _cached(namespace["constants"]), namespace["results"]

    def run(inputs: Sequence[Tensor], parameters: Numbers) -> Sequence[Tensor]:
        input = inputs[0]
        values = results(*inputs, *constants(parameters))
        return [torch.broadcast_to(_tensor(value, input), input.shape) for value in values]

    return run


def torch_rows(traced: TracedRows) -> Compiled:
    """The same of a row loss: its value, then its auxiliary results. The inputs' last dimension is the
    classes; a label, and what is a number of a row, has size 1 there, as these results do."""
    program = traced.reference
    names = {symbol: f"x{i}" for i, symbol in enumerate(traced.inputs)}
    printer = _TorchRows(names, traced.elements)
    source = _torch_source(traced, program, [*names.values(), "classes"], printer)
    namespace = _executed(traced, source)
    constants, results = _cached(namespace["constants"]), namespace["results"]

    def run(inputs: Sequence[Tensor], parameters: Numbers) -> Sequence[Tensor]:
        like = inputs[0]
        classes = like.new_full((), like.shape[-1])
        values = results(*inputs, classes, *constants(parameters))
        found = (_tensor(value, like) for value in values)
        return [t.expand(*like.shape[:-1], t.shape[-1] if t.dim() else 1) for t in found]

    return run
