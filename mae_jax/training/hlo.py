"""The text of a compiled program, as `compiled.as_text()` gives it, taken apart: computations of instructions.

XLA calls that language HLO; what the instructions mean is at openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

SLICING = ("dynamic-slice", "slice", "gather")  # which read no more of their first operand than they give

Groups = tuple[tuple[int, ...], ...]  # devices, by their number in the mesh, that take part in a collective together


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      shapes: (dtype, dimensions) of the result, or of the parts of a tuple.
      operands: names of instructions.
      attributes: all that comes behind the operands, as text.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def elements(self) -> int:
        """Of the result."""
        return sum(math.prod(dims) for _, dims in self.shapes)

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(math.prod(dims) * bits(dtype) for dtype, dims in self.shapes) // 8

    def called(self, attribute: str) -> str:
        """The computation that an attribute such as `body` names."""
        return re.search(rf"\b{attribute}=%([\w.-]+)", self.attributes)[1]


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """Who reads the result of an instruction."""
        users = collections.defaultdict(list)
        for instruction in self.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """In the order of the arguments they stand for."""
        found = (x for x in self.values() if x.opcode == "parameter")
        return tuple(sorted(found, key=lambda x: int(x.attributes.partition(")")[0])))

    def slices_of(self, name: str) -> list[Instruction] | None:
        """What takes slices of an instruction's result; None where something reads the whole of it."""
        slices = []
        for user in self.users[name]:
            if user.opcode == "bitcast":
                inner = self.slices_of(user.name)
            else:
                inner = [user] if user.opcode in SLICING and name not in user.operands[1:] else None
            if inner is None:
                return None
            slices += inner
        return slices


def bits(dtype: str) -> int:
    """Of one element: 16 of "bf16", 8 of "pred" and of "f8e4m3fn"."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 * (dtype == "pred")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and which one it enters."""
    computations, entry, current = {}, "", Computation()
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line):
            current[match[1]] = _instruction(match[1], line[match.end() :])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) if text[0] == "(" else text.index(" ")
    shapes = tuple(
        (dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"(\w+)\[([\d,<=]*)\]", text[:end])
    )
    start = text.index("(", end)
    opcode, rest = text[end:start].strip(), text[start:]
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:end]))
    return Instruction(name, opcode, shapes, operands, rest[1 if opcode == "parameter" else end :])


def _closing(text: str) -> int:
    """Where what follows the parenthesis begins that `text` begins with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def replica_groups(attributes: str, devices: int) -> Groups:
    """Who takes part with whom, from the attributes of a collective, in any of XLA's notations.

    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4)
    ((0, 1), (2, 3))
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['x'=2,'y'=2] {'x'}", 4)
    ((0, 2), (1, 3))
    """
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", attributes):
        return _mesh_groups(*match.groups(), devices)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\](<=\[\S+?\](?:T\([\d,]+\))?)", attributes):
        return _rows(_iota(match[3]).reshape(int(match[1]), int(match[2])))
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", attributes)
    if pairs:
        return tuple(tuple(map(int, group.split(","))) for group in pairs[1].split("},{"))
    return (tuple(range(devices)),)


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in array.tolist())


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _iota(text: str) -> np.ndarray:
    """ "[2,4]" counts from 0 to 7 in two rows of four; a T(1,0) behind it turns rows into columns."""
    dims, _, order = text.partition("T")
    array = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return array.transpose(_ints(order)) if order else array


def _mesh_groups(axes: str, ids: str | None, chosen: str, devices: int) -> Groups:
    """ "'x'=2,'y'=4", "[4,2]T(1,0)" and "'y'": along y, in a mesh of which the devices are numbered like that.

    A part of an axis is 'y':(2)2: in y = 2 * 2 * rest, the second factor.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(.*?)'=(\d+)", axes)}
    numbers = np.arange(devices) if not ids else _iota(ids) if "[" in ids else np.array(_ints(ids))
    parts, along = [], []  # the sizes of the axes, cut where only a part is chosen; which of them are
    wanted = {name: _ints(part) for name, part in re.findall(r"'(.*?)'(:\(\d+\)\d+)?", chosen)}
    for name, size in sizes.items():
        before, length = wanted.get(name) or (1, size)
        along += [len(parts) + 1] * (name in wanted)
        parts += [before, length, size // (before * length)]
    numbers = np.moveaxis(numbers.reshape(parts), along, range(-len(along), 0))
    return _rows(numbers.reshape(-1, math.prod(numbers.shape[len(parts) - len(along) :])))
