"""What a compiled program does: arithmetic, bytes touched, and what devices send one another.

XLA's own cost analysis counts the body of a loop once, however often it runs, and says nothing of what is sent; so the
text of the program is read here. All numbers are of one device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from mae_jax.training.hlo import SLICING, Computation, Groups, Instruction, parse, replica_groups

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What neither computes nor moves anything.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", *(f"{kind}-done" for kind in COLLECTIVES)),
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a device runs as one, `times` times.

    Attributes:
      flops: of its matrix products, each time.
      bytes: that it reads and writes, each time.
    """

    flops: int
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that devices put together, reduce or exchange, `times` times.

    Attributes:
      kind: one of `COLLECTIVES`. An all-reduce of which every device keeps its own slice alone is "reduce-scatter":
        compilers for GPUs and TPUs make one of it (XLA's reduce_scatter_creator.cc), that for CPUs does not.
      bytes: of the array: the whole one where it is gathered or scattered.
      groups: who takes part with whom.
    """

    kind: str
    bytes: int
    groups: Groups
    times: int

    @property
    def size(self) -> int:
        """Devices in a group."""
        return len(self.groups[0])

    @property
    def sent(self) -> float:
        """Bytes that each device of a group sends each time, by the ring algorithms (Patarasuk & Yuan 2009)."""
        if self.kind == "collective-permute":
            return self.bytes
        return (1 + (self.kind == "all-reduce")) * self.bytes * (self.size - 1) / self.size


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program does on one device."""

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]

    @property
    def flops(self) -> int:
        """Of all matrix products."""
        return sum(operation.flops * operation.times for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Read and written by all operations."""
        return sum(operation.bytes * operation.times for operation in self.operations)


def read(text: str, devices: int) -> Program:
    """What the program of this text does on each of so many devices."""
    computations, entry = parse(text)
    operations, found = [], []
    for instruction, within, times in _executed(computations, entry, 1):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            found += _collectives(kind, instruction, within, computations, times, devices)
        else:
            flops = _product_flops(instruction, within, computations)
            operations.append(Operation(flops, _touched(instruction, within, computations), times))
    return Program(tuple(operations), tuple(found))


def _executed(computations: Mapping[str, Computation], name: str, times: int) -> Iterator:
    """(instruction, its computation, how often) of all that runs on its own: not what fusions hold; loops unrolled."""
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
            yield from _executed(computations, instruction.called("body"), times * int(count[1] if count else 1))
        elif instruction.opcode == "call":
            yield from _executed(computations, instruction.called("to_apply"), times)
        elif instruction.opcode == "conditional":
            for branch in re.findall(r"%([\w.-]+)", instruction.attributes):
                yield from _executed(computations, branch, times)
        elif instruction.opcode not in FREE:
            yield instruction, computations[name], times


def _product_flops(instruction: Instruction, within: Computation, computations: Mapping[str, Computation]) -> int:
    """Of the matrix products of an instruction, or of what it fuses: two for each pair of factors."""
    if instruction.opcode == "fusion":
        body = computations[instruction.called("calls")]
        return sum(_product_flops(inner, body, computations) for inner in body.values())
    if instruction.opcode != "dot":
        return 0
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    factor = within[instruction.operands[0]].shapes[0][1]
    return 2 * instruction.elements * math.prod(factor[int(i)] for i in contracted.split(",") if i)


def _converts(instruction: Instruction, computations: Mapping[str, Computation]) -> bool:
    """Whether all that an instruction does is to change the dtype."""
    if instruction.opcode != "fusion":
        return instruction.opcode == "convert"
    body = computations[instruction.called("calls")].values()
    return len(instruction.operands) == 1 and {x.opcode for x in body} <= {"parameter", "convert", "bitcast"}


def _touched(instruction: Instruction, within: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes that an instruction reads and writes; of arrays that it takes slices of or changes a part of, the part.

    What only changes the dtype belongs to what stands beside it, and touches nothing itself: compilers for GPUs and
    TPUs write the result of a product as bfloat16 at once, and that for CPUs float32 first, to be converted.
    """

    def read(name: str) -> int:
        source = within[name]
        return min(source.bytes, read(source.operands[0])) if _converts(source, computations) else source.bytes

    def written() -> int:
        users = within.users[instruction.name]
        if users and all(_converts(user, computations) for user in users):
            return min(instruction.bytes, sum(user.bytes for user in users))
        return instruction.bytes

    if _converts(instruction, computations):
        return 0
    if instruction.opcode in SLICING:
        return 2 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * within[instruction.operands[1]].bytes
    if instruction.opcode != "fusion":
        return written() + sum(read(name) for name in instruction.operands)
    body = computations[instruction.called("calls")]
    updates = [inner for inner in body.values() if inner.opcode == "dynamic-update-slice"]
    changed = {update.operands[0] for update in updates}
    total = sum(body[update.operands[1]].bytes for update in updates) if updates else written()
    for parameter, name in zip(body.parameters, instruction.operands, strict=True):
        slices = body.slices_of(parameter.name)
        if parameter.name not in changed:
            total += read(name) if slices is None else sum(part.bytes for part in slices)
    return total


def _collectives(
    kind: str,
    instruction: Instruction,
    within: Computation,
    computations: Mapping[str, Computation],
    times: int,
    devices: int,
) -> Iterator[Collective]:
    """One for each array that is sent; none where no device has to send it."""
    groups = replica_groups(instruction.attributes, devices)
    size = len(groups[0])
    for number, name in enumerate(instruction.operands if size > 1 else ()):
        array, users = within[name], within.users[instruction.name]
        if len(instruction.operands) > 1:  # the results are a tuple, which is taken apart
            parts = [part for part in users if re.search(rf"index={number}\b", part.attributes)]
            users = [(part.name, user) for part in parts for user in within.users[part.name]]
        else:
            users = [(instruction.name, user) for user in users]
        kept = [_takes_slice(result, user, array.elements // size, computations) for result, user in users]
        whole = array.bytes * (size if kind == "all-gather" else 1)
        sliced = kind == "all-reduce" and kept and all(kept)
        yield Collective("reduce-scatter" if sliced else kind, whole, groups, times)


def _takes_slice(name: str, user: Instruction, elements: int, computations: Mapping[str, Computation]) -> bool:
    """Whether an instruction reads one slice of so many elements, and no more, of what is called `name`."""
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name and user.elements == elements
    if user.opcode != "fusion":
        return False
    body = computations[user.called("calls")]
    slices = [body.slices_of(body.parameters[i].name) for i, used in enumerate(user.operands) if used == name]
    own = [("dynamic-slice", elements)]  # a fixed slice would be the same on every device
    return all(parts is not None and [(part.opcode, part.elements) for part in parts] == own for parts in slices)
