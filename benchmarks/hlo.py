"""What a compiled program reads and writes, from the text of its optimised HLO.

A fusion reads its operands whole, except for what it cuts out of them; an update in place writes
the update. Arrays that a TPU keeps in its vector memory count once, where they are fetched.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)(?:e\dm\d\w*)?\[([\d,]*)\](\{[^{}]*\})?")
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_CALLS = ("async-start", "call", "conditional", "while")
_CUTS = ("dynamic-slice", "gather", "slice")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
"""Operations that exchange arrays with other devices."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool
    """In the device's memory, not in a TPU's vector memory."""

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes, wherever it is."""
        return self.elements * (_BITS.get(self.dtype) or int(self.dtype.lstrip("fsuc"))) // 8

    @property
    def moved(self) -> int:
        """Bytes that move between memory and the cores when it is read or written."""
        return self.size if self.in_memory else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """Names of the computations that it calls."""
    number: int
    """A parameter's index, a whole constant's value, or the turns of a loop; -1: none is stated."""
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collective operations of one kind."""

    count: int = 0
    received: int = 0
    """Bytes of their results. Of all-gathers what the device had is left out, so it is what comes
    from the others."""


Computation = dict[str, Instruction]
"""By name, in order."""


class Module:
    """A compiled program.

    Args:
        text: as `jax.stages.Compiled.as_text` returns it.
    """

    def __init__(self, text: str):
        self._computations: dict[str, Computation] = {}
        self.entry = ""
        """The name of the computation that the program runs."""
        current: Computation = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = self._computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif (instruction := _parse(line)) is not None:
                current[instruction.name] = instruction
        for computation in self._computations.values():
            for each in computation.values():
                if each.opcode == "fusion" and self._only_renames(each.called[0]):
                    computation[each.name] = dataclasses.replace(each, opcode="bitcast")

    def loop(self) -> str:
        """Return the name of the body of the longest loop that the program itself runs.

        Raises:
            ValueError: it runs none.
        """
        loops = [each for each in self._walk(self.entry) if each.opcode == "while"]
        if not loops:
            raise ValueError("the program has no loop")
        longest = max(loops, key=lambda loop: sum(1 for _ in self._walk(_body(loop))))
        return _body(longest)

    def conditionals(self, name: str) -> int:
        """Return how often one turn of a computation asks the device what to do next."""
        return sum(each.opcode == "conditional" for each in self._walk(name))

    def traffic(self, name: str) -> int:
        """Return the bytes that one turn of a computation reads and writes."""
        computation, total = self._computations[name], 0
        for each in computation.values():
            if each.opcode in _FREE or each.opcode.endswith("-done"):
                continue
            if each.opcode == "while":
                total += self._turns(each) * self.traffic(_body(each))
            elif each.opcode == "conditional":
                total += max(self.traffic(branch) for branch in each.called)
            elif each.opcode in ("call", "async-start"):
                total += sum(self.traffic(called) for called in each.called)
            else:
                total += self._read(computation, each) + self._written(computation, each)
        return total

    def large_results(self, name: str, elements: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return the arrays of so many numbers or more that one turn writes to memory.

        Returns:
            The name of each instruction, and the array's shape. Updates in place are left out.
        """
        found = []
        for computation, each in self._instructions(name):
            if each.opcode in _FREE or each.opcode in _CALLS or each.opcode.endswith("-done"):
                continue
            large = [a for a in _targets(each) if a.in_memory and a.elements >= elements]
            if large and self._written(computation, each) >= min(a.moved for a in large):
                found.append((each.name, large[0].shape))
        return found

    def collectives(self, name: str) -> dict[str, Exchange]:
        """Return what one turn of a computation exchanges with other devices, by operation."""
        found: dict[str, Exchange] = {}
        for turns, computation, each in self._with_turns(name):
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                received = sum(array.size for array in _targets(each))
                if kind == "all-gather":
                    operands = [computation[name].results for name in each.operands]
                    received -= sum(array.size for arrays in operands for array in arrays)
                old = found.get(kind, Exchange())
                found[kind] = Exchange(old.count + turns, old.received + turns * received)
        return found

    def _with_turns(self, name: str) -> Iterator[tuple[int, Computation, Instruction]]:
        """Yield what a computation runs, and how often, with the computation that it is in."""
        computation = self._computations[name]
        for each in computation.values():
            yield 1, computation, each
            turns = self._turns(each) if each.opcode == "while" else 1
            for called in each.called if each.opcode in _CALLS else ():
                for inner, within, what in self._with_turns(called):
                    yield turns * inner, within, what

    def _instructions(self, name: str) -> Iterator[tuple[Computation, Instruction]]:
        """Yield what a computation runs, with the computation that it is in; fusions are one."""
        computation = self._computations[name]
        for each in computation.values():
            yield computation, each
            if each.opcode in _CALLS:
                for called in each.called:
                    yield from self._instructions(called)

    def _turns(self, loop: Instruction) -> int:
        """Return a loop's turns: as stated, or the bound that its condition compares with."""
        if loop.number >= 0:
            return loop.number
        condition = self._computations[loop.called[1]].values()
        bounds = [each.number for each in condition if each.opcode == "constant"]
        if not bounds:
            raise ValueError(f"the turns of {loop.name} are not known")
        return max(bounds)

    def _only_renames(self, name: str) -> bool:
        opcodes = {each.opcode for each in self._computations[name].values()}
        return opcodes <= {"parameter", "bitcast"}

    def _walk(self, name: str) -> Iterator[Instruction]:
        return (each for _, each in self._instructions(name))

    def _read(self, computation: Computation, each: Instruction) -> int:
        total = 0
        for index, operand in enumerate(each.operands):
            arrays = computation[operand].results if operand in computation else ()
            whole = sum(array.moved for array in arrays)
            if each.opcode == "fusion":
                share = self._share_read(each.called[0], index)
                total += whole if share is None else min(whole, share)
            elif index == 0 and each.opcode in (*_CUTS, "slice-start"):
                total += min(whole, sum(array.size for array in _targets(each)))
            elif index > 0 or each.opcode not in ("dynamic-update-slice", "scatter"):
                total += whole
        return total

    @functools.cache  # noqa: B019 - a module lives as long as its caller needs it
    def _share_read(self, name: str, index: int) -> int | None:
        """Return the bytes that a fusion reads of an operand; None: all of it."""
        computation = self._computations[name]
        (parameter,) = (
            each.name
            for each in computation.values()
            if each.opcode == "parameter" and each.number == index
        )
        return self._share_of(computation, parameter)

    def _share_of(self, computation: Computation, name: str) -> int | None:
        total = 0
        for user in computation.values():
            for place, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in ("bitcast", "get-tuple-element"):
                    share = self._share_of(computation, user.name)
                elif user.opcode == "fusion":
                    share = self._share_read(user.called[0], place)
                elif place == 0 and user.opcode in _CUTS:
                    share = sum(array.size for array in user.results)
                elif place == 0 and user.opcode in ("dynamic-update-slice", "scatter"):
                    share = 0
                else:
                    share = None
                if share is None:
                    return None
                total += share
        return total

    def _written(self, computation: Computation, each: Instruction) -> int:
        """Return the bytes that an instruction writes; of an update in place, the update's."""
        if each.opcode == "fusion":
            fused = self._computations[each.called[0]]
            return self._written_by_root(fused, next(i for i in fused.values() if i.is_root), each)
        if each.opcode in ("dynamic-update-slice", "scatter"):
            place = 1 if each.opcode == "dynamic-update-slice" else 2
            update = sum(array.size for array in computation[each.operands[place]].results)
            return min(update, _moved(each))
        return _moved(each)

    def _written_by_root(self, fused: Computation, root: Instruction, outer: Instruction) -> int:
        if root.opcode == "tuple":
            parts = zip(root.operands, outer.results, strict=False)
            return sum(
                self._written_by_root(
                    fused, fused[name], dataclasses.replace(outer, results=(array,))
                )
                for name, array in parts
            )
        if root.opcode == "bitcast":
            return self._written_by_root(fused, fused[root.operands[0]], outer)
        if root.opcode in ("fusion", "dynamic-update-slice", "scatter"):
            return min(self._written(fused, root), _moved(outer))
        return _moved(outer)


def _targets(instruction: Instruction) -> tuple[Array, ...]:
    """Return the results; of an asynchronous copy, which lists its source too, the copy."""
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        sources = len(instruction.operands)
        return instruction.results[sources : 2 * sources]
    place = {"copy-start": 0, "slice-start": 1}.get(instruction.opcode)
    return instruction.results if place is None else instruction.results[place : place + 1]


def _moved(instruction: Instruction) -> int:
    return sum(array.moved for array in _targets(instruction))


def _body(loop: Instruction) -> str:
    return loop.called[0]


def _parse(line: str) -> Instruction | None:
    """Return the instruction of a line; None: it is none."""
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if head is None:
        return None
    result, rest = _split_result(line[head.end() :])
    call = re.match(r" ([\w-]+)\(", rest)
    if call is None:
        return None
    inside, attributes = _split_result(rest[call.end() - 1 :])
    number = re.fullmatch(r"\((\d+)\)", inside)
    number = number or re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
    return Instruction(
        name=head[2],
        opcode=call[1],
        results=tuple(_arrays(result)),
        operands=tuple(re.findall(r"%([\w.-]+)", inside)),
        called=tuple(_called(attributes)),
        number=int(number[1]) if number else -1,
        is_root=bool(head[1]),
    )


def _split_result(text: str) -> tuple[str, str]:
    """Cut a text behind its first part: a tuple in parentheses, or up to a space."""
    if not text.startswith("("):
        end = text.find(" ")
        return (text, "") if end < 0 else (text[:end], text[end:])
    depth = 0
    for end, character in enumerate(text, start=1):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:end], text[end:]
    return text, ""


def _arrays(result: str) -> Iterator[Array]:
    for found in _ARRAY.finditer(result):
        shape = tuple(int(n) for n in found[2].split(",") if n)
        yield Array(found[1], shape, in_memory="S(1)" not in (found[3] or ""))


def _called(attributes: str) -> Iterator[str]:
    """Yield the computations that an instruction calls; of a loop body and condition."""
    keys = "body condition calls to_apply true_computation false_computation"
    for key in keys.split():
        yield from re.findall(rf"\b{key}=%?([\w.-]+)", attributes)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
        yield from re.findall(r"%?([\w.-]+)", branches)
