"""What a compiled program does, read from its scheduled HLO text.

XLA's own summary counts the body of a loop once, however often it runs, so it says nothing about a scan over layers.
Here loops are multiplied out: the estimated cycles that the TPU compiler writes beside each fusion, and the bytes of
the collectives by kind. No Pallas kernel carries such an estimate, and no time that is spent waiting for the network
is in it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)(?=\()")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_LIMIT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
# What carries between slices; other hosts' programs, such as callbacks, send as well.
_MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: in the program.
        opcode: fusion, while, all-gather, ...
        shape: the text of its result's type.
        operands: the same of its operands.
        line: all of it.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    line: str

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it makes none."""
        match = _CYCLES.search(self.line)
        return int(match[1]) if match else 0

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from."""
        match = _OP_NAME.search(self.line)
        return match[1] if match else ""

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"{key}=%?([\w.\-]+)", self.line)
        return match[1] if match else None


class Program:
    """A module in HLO text.

    Args:
        text: jax.stages.Compiled.as_text().
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        shapes: dict[str, str] = {}  # by name, of the computation
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[1]] = []
                shapes = {}
                if line.startswith("ENTRY"):
                    self.entry = header[1]
            elif line == "}":  # an attribute of a kernel may itself end in a line that begins with braces
                current = None
            elif current is not None and (begin := _INSTRUCTION.match(line)):
                shape, rest = _split_shape(line[begin.end() :])
                if opcode := _OPCODE.match(rest):
                    # By name, for not every version of XLA writes their types here; what is used has been printed.
                    names = _OPERAND.findall(_split_shape(rest[opcode.end() :])[0])
                    operands = tuple(shapes[name] for name in names if name in shapes)
                    current.append(Instruction(begin[1], opcode[1], shape, operands, line))
                    shapes[begin[1]] = shape

    def walk(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs, with how often it does; those inside fusions are left out."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations.get(name, ()):
            yield instruction, times
            if instruction.opcode == "while":
                body, condition = instruction.called("body"), instruction.called("condition")
                if body and condition:
                    yield from self._walk(body, times * self.trips(condition))
            elif instruction.opcode == "conditional":
                branches = _BRANCHES.search(instruction.line)
                for branch in branches[1].split(",") if branches else ():
                    yield from self._walk(branch.strip().lstrip("%"), times)
            elif instruction.opcode in ("call", "async-start"):
                yield from self._walk(
                    instruction.called("to_apply") or instruction.called("calls") or "", times
                )

    def trips(self, condition: str) -> int:
        """How often a loop runs whose counter is compared with a constant, as that of lax.scan; 1 where it is not."""
        inside = list(self._inside(condition))
        limits = {int(found[1]) for instruction in inside if (found := _LIMIT.search(instruction.line))}
        # XLA may peel the first turn off and put it before the loop, which then begins at 1 and is named for it.
        peeled = any("loop_peel" in instruction.name for instruction in inside)
        return max(limits) - peeled if limits else 1

    def _inside(self, name: str) -> Iterator[Instruction]:
        """The instructions of a computation and of all that it calls."""
        for instruction in self.computations.get(name, ()):
            yield instruction
            for called in _CALLED.findall(instruction.line):
                yield from self._inside(called)

    @functools.cached_property
    def cycles(self) -> int:
        """Estimated cycles of the whole program on one chip."""
        return sum(instruction.cycles * times for instruction, times in self.walk())

    def loops(self) -> Iterator[tuple[Instruction, int, int, bool]]:
        """(the while, how often it turns, estimated cycles of one turn, whether loops are in it) of the outermost
        ones, in the order in which they run."""
        for instruction in self.computations.get(self.entry, ()):
            body, condition = instruction.called("body"), instruction.called("condition")
            if instruction.opcode == "while" and body and condition:
                inside = list(self._walk(body, 1))
                cycles = sum(found.cycles * times for found, times in inside)
                nested = any(found.opcode == "while" for found, _ in inside)
                yield instruction, self.trips(condition), cycles, nested

    def slowest(self, count: int = 20) -> list[tuple[int, int, Instruction]]:
        """(estimated cycles in all, how often, the instruction) of those that take most."""
        found = [
            (instruction.cycles * times, times, instruction)
            for instruction, times in self.walk()
            if instruction.cycles
        ]
        return sorted(found, key=lambda entry: -entry[0])[:count]

    def collective_bytes(self) -> dict[str, int]:
        """{kind: bytes} that a chip takes part in: of an all-gather the result, of the others the operand.

        A collective may be taken apart into a chain of fusions, from the one that starts it to the one that ends it,
        with the loops between them: it counts once, as often as its start runs. Its channel does not tell it from
        others, for a turn that is peeled off a loop keeps the channels of the loop. An all-reduce of which only a
        slice is kept, in one fusion, is a reduce-scatter. What is reduced over several slices is sent to the host,
        which exchanges it over the data center's network: BETWEEN_SLICES counts what a chip sends there, and receives
        as much.
        """
        total: Counter[str] = Counter()
        seen: set[str] = set()
        for instruction, times in self.walk():
            if instruction.opcode == "send" and _MEGASCALE in instruction.line:
                total[BETWEEN_SLICES] += shape_bytes(instruction.operands[0]) * times
                continue
            inside = (
                list(self._inside(instruction.called("calls") or ""))
                if instruction.opcode == "fusion"
                else [instruction]
            )
            scattered = instruction.opcode == "fusion" and any(x.opcode == "dynamic-slice" for x in inside)
            for found in inside:
                kind = found.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                if chain := _CHAIN.search(found.line):
                    if chain[1] in seen:
                        continue
                    seen.add(chain[1])
                if kind != "all-gather":
                    size = sum(map(shape_bytes, found.operands))
                elif found.opcode.endswith("-start"):
                    size = largest_bytes(found.shape)  # (operand, result)
                else:
                    size = shape_bytes(found.shape)
                total["reduce-scatter" if kind == "all-reduce" and scattered else kind] += size * times
        return dict(total)

    def kernels(self) -> Counter[str]:
        """{target: how often it runs} of the custom calls; Pallas kernels are tpu_custom_call."""
        found: Counter[str] = Counter()
        for instruction, times in self.walk():
            if instruction.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', instruction.line)
                found[target[1] if target else ""] += times
        return found

    def shapes(self, opcode: str) -> Iterator[tuple[int, ...]]:
        """The result shapes of all instructions of a kind, also inside fusions."""
        for instructions in self.computations.values():
            for instruction in instructions:
                if instruction.opcode == opcode and (array := _ARRAY.search(instruction.shape)):
                    yield tuple(map(int, filter(None, array[2].split(","))))


def shape_bytes(shape: str) -> int:
    """Bytes of a type, those of a tuple's parts added up."""
    return sum(_array_bytes(kind, sizes) for kind, sizes in _ARRAY.findall(shape))


def largest_bytes(shape: str) -> int:
    """Bytes of the largest array of a type."""
    return max((_array_bytes(kind, sizes) for kind, sizes in _ARRAY.findall(shape)), default=0)


def _array_bytes(kind: str, sizes: str) -> int:
    bits = 8 if kind == "pred" else int(re.sub(r"^[a-z]+", "", kind).split("e")[0])
    return math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8


def _split_shape(text: str) -> tuple[str, str]:
    """(the type at the beginning of a text, what follows it)."""
    if not text.startswith("("):
        end = text.find(" ")
        return text[:end], text[end:]
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""
