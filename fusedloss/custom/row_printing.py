"""Prints the level form of a row loss: a C++ struct, and a module for the Triton backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import sympy
from sympy.core.parameters import distribute

from .primitives import Expr, Input
from .printing import Numbers, Printer, _Cpp, _CppConstant, _Triton, host_constants
from .row_primitives import Weighted
from .row_tracing import Kind, TracedRows
from .tracing import _repeated
from .walks import Named, RowProgram, Walk

_KINDS = {
    Kind.ELEMENT: "kElement",
    Kind.LABEL: "kLabel",
    Kind.PER_ROW: "kPerRow",
    Kind.PER_CLASS: "kPerClass",
}


class _Rows(Printer):
    """Formulas of elements or of rows, whose symbols are places in arrays. An argument may have the name
    of another symbol."""

    def __init__(self, places: Mapping[Expr, str]) -> None:
        super().__init__({})
        self.places = places

    def _Symbol(self, e: Expr) -> str:
        return self.places.get(e, str(e.name))

    def _Centered(self, e: Expr) -> str:
        x, origin = map(self, e.args)
        return f"({x} - {origin})"

    def _Together(self, e: Expr) -> str:
        return self(e.args[0])


class _CppRows(_Rows, _Cpp):
    pass


class _CppElements(_CppRows):
    def _exp_nonpositive(self, e: Expr) -> str:
        return f"exp_of_class({self(e.args[0])}, r)"


def cpp(traced: TracedRows, program: RowProgram) -> str:
    """The struct that csrc/math/custom_rows.h describes."""
    return "\n".join(_Struct(traced, program).lines()) + "\n"


def _array(kind: str, name: str, items: Sequence[object], none: str) -> Iterator[str]:
    """A constant array. One without items has one that nobody reads, since C++ has no empty arrays."""
    yield f"  static constexpr {kind} {name}[] = {{{', '.join(map(str, items or [none]))}}};"


class _Struct:
    def __init__(self, traced: TracedRows, program: RowProgram) -> None:
        self.traced = traced
        self.program = program
        self.places = self.program.numbers
        of_class = [*traced.of_kind(Kind.ELEMENT)], [*traced.of_kind(Kind.PER_CLASS)]
        self.names = {
            **{s: f"x[{i}]" for i, s in enumerate(of_class[0])},
            **{s: f"w[{i}]" for i, s in enumerate(of_class[1])},
            **{s: f"kept[{i}]" for i, (s, _, _) in enumerate(self.program.kept)},
        }

    def lines(self) -> Iterator[str]:
        program, traced = self.program, self.traced
        constants = len(program.constants)
        kinds = [f"Kind::{_KINDS[kind]}" for kind in traced.kinds]
        yield f"// {traced.identifier}: {traced.text(traced.value)}"
        yield f"struct Loss : CustomRows<{max(constants, 1)}> {{"
        yield from _array("Kind", "kKinds", kinds, "")
        yield f"  static constexpr int kParameters = {len(traced.parameters)};"
        yield f"  static constexpr int kLevels = {len(program.walks)};"
        yield from _array("int", "kMaxima", program.maxima, "0")
        yield from _array("int", "kSums", program.sums, "0")
        yield from _array("int", "kOriginOf", self._origins(), "-1")
        yield f"  static constexpr int kKeptCount = {len(program.kept)};"
        yield f"  static constexpr int kKeptNarrow = {program.kept_narrow};"
        yield f"  static constexpr int kHeld = {program.held};"
        yield f"  static constexpr int kHeldNarrow = {program.held_narrow};"
        kept = [f"{{{first}, {last}}}" for _, first, last in program.kept]
        yield from _array("Kept", "kKept", kept, "{}")
        yield f"  static constexpr int kNumbers = {len(self.places)};"
        yield f"  static constexpr int kValue = {self.places[program.value]};"
        for name, symbols in {"kAtLabel": program.at_label, "kOfRow": program.of_row}.items():
            yield from _array("int", name, [self.places[s] for s in symbols], "-1")
        yield f"  static constexpr int kPeakCount = {len(program.peaks)};"
        peaks = [f"{{{peak.level}, {peak.term}}}" for peak in program.peaks]
        yield from _array("Peak", "kPeaks", peaks, "{}")
        yield f"  static constexpr int kAuxiliaryCount = {len(program.auxiliary)};"
        auxiliary = [self.places[s] for s in program.auxiliary]
        yield from _array("int", "kAuxiliary", auxiliary, "-1")
        yield from self._prepare()
        yield from self._row()
        of_class = "[[maybe_unused]] const T* x, [[maybe_unused]] const T* w"
        element = f"{of_class}, [[maybe_unused]] const Row& r"
        kept_by = "[[maybe_unused]] T* kept"
        yield from self._choice(
            "template <int kLevel, class T, class Row>", "terms",
            f"{element}, {kept_by}, T* out", "kLevel",
            [list(self._walk(walk, _assign)) for walk in program.walks],
        )  # fmt: skip
        yield "  template <bool kAll, class T, class Row>"
        yield f"  FUSEDLOSS_HD void gradients({element}, [[maybe_unused]] const T* kept, T* out) const {{"
        yield from ("    " + line for line in self._walk(program.gradients, _first_or_all))
        yield "  }"
        yield from self._choice(
            "template <int kPeak, class T, class Row>", "at_peak",
            f"{element}, [[maybe_unused]] T* out", "kPeak",
            [list(self._walk(peak.gradients, _assign)) for peak in program.peaks],
        )  # fmt: skip
        yield "};"

    def _origins(self) -> list[int]:
        """For each maximum, the element input whose largest element it is, if it may leave out a nan because
        the row's results are nan anyway; else -1."""
        program, elements = self.program, [*self.traced.of_kind(Kind.ELEMENT)]
        slopes = *program.gradients.results, *(e for _, e in program.gradients.named)
        # A class without a share has a slope of 0, whatever the rest is.
        if any(e.has(Weighted) for e in slopes):
            return [-1] * sum(program.maxima)
        return [
            elements.index(e) if e in elements and not program.is_read(symbol) else -1
            for level, walk, count in zip(
                program.levels, program.walks, program.maxima, strict=True
            )
            for symbol, e in zip(level[:count], walk.results[:count], strict=True)
        ]

    def _prepare(self) -> Iterator[str]:
        names = {name: f"parameters[{i}]" for i, name in enumerate(self.traced.parameters)}
        printer = _CppConstant(names)
        yield (
            "  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, "
            "[[maybe_unused]] double* constants) {"
        )
        for i, (_, formula) in enumerate(self.program.constants):
            yield f"    constants[{i}] = {printer(formula)};"
        yield "  }"

    def _row(self) -> Iterator[str]:
        names = {s: f"r[{i}]" for s, i in self.places.items()}
        blocks = []
        for numbers in self.program.computed:
            lines = []
            printer = _CppRows(names)
            for symbol, formula in numbers:
                to = (
                    f"r[{self.places[symbol]}]" if symbol in self.places else f"const auto {symbol}"
                )
                lines.append(f"{to} = {printer(formula)};")
            blocks.append([*self._constants(e for _, e in numbers), *lines])
        yield from self._choice(
            "template <int kLevel, class T>",
            "row",
            "[[maybe_unused]] T* r",
            "kLevel",
            blocks,
            first=-1,
        )

    def _choice(
        self,
        template: str,
        name: str,
        arguments: str,
        which: str,
        blocks: list[list[str]],
        first: int = 0,
    ) -> Iterator[str]:
        """A function of which each number of `which` has a block."""
        yield f"  {template}"
        yield f"  FUSEDLOSS_HD void {name}({arguments}) const {{"
        for i, lines in enumerate(blocks, first):
            if lines:
                yield f"    if constexpr ({which} == {i}) {{"
                yield from ("      " + line for line in lines)
                yield "    }"
        yield "  }"

    def _constants(self, formulas: Iterable[Expr]) -> Iterator[str]:
        """Those that formulas use, as a T."""
        there = set().union(*(e.free_symbols for e in formulas))
        for i, (symbol, _) in enumerate(self.program.constants):
            if symbol in there:
                yield f"[[maybe_unused]] const T c{i}(constants[{i}]);"

    def _walk(self, walk: Walk, result: Callable[[int, str], str]) -> Iterator[str]:
        yield from self._constants([*(e for _, e in walk.named), *walk.results])
        names = {**self.names, **{s: f"r({i})" for s, i in self.places.items()}}
        printer = _CppElements(names)
        for symbol, formula in walk.named:
            to = self.names[symbol] if isinstance(symbol, Input) else f"const auto {symbol}"
            yield f"{to} = {printer(formula)};"
        for i, formula in enumerate(walk.results):
            yield result(i, printer(formula))


def _assign(i: int, formula: str) -> str:
    return f"out[{i}] = {formula};"


def _first_or_all(i: int, formula: str) -> str:
    return f"{'if constexpr (kAll) ' if i else ''}out[{i}] = {formula};"


# ---- Triton --------------------------------------------------------------------------------------


class _TritonRows(_Rows, _Triton):
    pass


class _TritonElements(_TritonRows):
    def _exp_nonpositive(self, e: Expr) -> str:
        return f"losses.exp_of_logit({self(e.args[0])}, NARROW)"


def triton(traced: TracedRows, program: RowProgram) -> tuple[str, Callable[[Numbers], Numbers]]:
    """A module for the engine of fusedloss/backends/triton/custom_rows.py, which says what is in it, and
    the constants as a function of the parameters' numbers."""
    module = _Module(traced, program)
    return "\n".join(module.lines()) + "\n", host_constants(traced, module.program)


Block = tuple[Named, Sequence[Expr]]  # what its results share, and the results


class _Module:
    def __init__(self, traced: TracedRows, program: RowProgram) -> None:
        self.traced = traced
        self.program = program
        self.rows = [self._block(named) for named in program.computed]
        # Row numbers stand where they come: a level's maxima and sums, then what follows from them.
        given = len(program.numbers) - sum(len(results) for _, results in self.rows)
        given -= sum(map(len, program.levels))
        order = [*itertools.islice(program.numbers, given), *self._numbers(program.computed[0])]
        for level, named in zip(program.levels, program.computed[1:], strict=True):
            order += [*level, *self._numbers(named)]
        kinds = [*traced.of_kind(Kind.ELEMENT)], [*traced.of_kind(Kind.PER_CLASS)], order
        constants = [symbol for symbol, _ in program.constants]
        self.places = {symbol: place for place, symbol in enumerate(order)}
        self.names = {
            symbol: f"{name}[{i}]"
            for name, symbols in zip("xwrc", (*kinds, constants), strict=True)
            for i, symbol in enumerate(symbols)
        }

    def _numbers(self, named: Named) -> list[Expr]:
        return [symbol for symbol, _ in named if symbol in self.program.numbers]

    def _block(self, named: Named) -> Block:
        numbers = self._numbers(named)
        shared = tuple((symbol, e) for symbol, e in named if symbol not in numbers)
        return shared, [e for symbol, e in named if symbol in numbers]

    def lines(self) -> Iterator[str]:
        program, traced = self.program, self.traced
        yield f"# {traced.identifier}: {traced.text(traced.value)}"
        yield "import triton"
        yield "import triton.language as tl"
        yield ""
        yield "from fusedloss.backends.triton import losses, primitives"
        yield ""
        maxima = (
            tuple(map(program.is_read, symbols[:count]))
            for symbols, count in zip(program.levels, program.maxima, strict=True)
        )
        yield f"KINDS = {tuple(kind.value for kind in traced.kinds)}"
        yield f"MAXIMA = {tuple(maxima)}"
        yield f"SUMS = {program.sums}"
        peaks = sorted(program.peaks, key=lambda peak: peak.level)
        yield f"PEAKS = {tuple((peak.level, peak.term) for peak in peaks)}"
        results = program.value, *program.at_label, *program.of_row
        yield f"RESULTS = {tuple(self.places[symbol] for symbol in results)}"
        yield f"EXTRAS = {tuple(self.places[symbol] for symbol in program.auxiliary)}"
        *walks, gradients = self._without_kept()
        of_rows, of_elements = _TritonRows(self.names), _TritonElements(self.names)
        element = "x, w, r, c, NARROW: tl.constexpr"
        at_peaks = [(peak.gradients.named, peak.gradients.results) for peak in peaks]
        yield from _function("row", "r, c, LEVEL: tl.constexpr", of_rows, self.rows, "LEVEL", -1)
        yield from _function(
            "terms", f"{element}, LEVEL: tl.constexpr", of_elements, walks, "LEVEL"
        )
        yield from _function("gradients", element, of_elements, [gradients])
        yield from _function(
            "at_peak", f"{element}, PEAK: tl.constexpr", of_elements, at_peaks, "PEAK"
        )

    def _without_kept(self) -> Iterator[Block]:
        """The walks, the gradients' as the last, which compute again what others keep. Where a row is
        in registers, Triton finds that it is there already."""
        kept: dict[Expr, Expr] = {}
        for walk in (*self.program.walks, self.program.gradients):
            known = dict(kept)
            with distribute(False):
                for symbol, e in walk.named:
                    known[symbol] = e.xreplace(known)
                results = [e.xreplace(known) for e in walk.results]
                shared, found = _repeated(results, sympy.numbered_symbols("t"))
            kept = {symbol: e for symbol, e in known.items() if isinstance(symbol, Input)}
            yield tuple(shared), found


def _function(
    name: str,
    arguments: str,
    printer: Printer,
    blocks: Sequence[Block],
    which: str = "",
    first: int = 0,
) -> Iterator[str]:
    """A function that returns a block's results; each number of `which` has one."""
    if not blocks:
        return
    yield from (
        "",
        "",
        "@triton.jit",
        f"def {name}({arguments}):",
        "    T: tl.constexpr = r[0].dtype",
    )
    indent = "    "
    for i, (shared, results) in enumerate(blocks, first):
        if which:
            yield f"    {'if' if i == first else 'elif'} {which} == {i}:"
            indent = "        "
        yield from (f"{indent}{symbol} = {printer(e)}" for symbol, e in shared)
        yield f"{indent}return ({''.join(printer(e) + ', ' for e in results)})"
