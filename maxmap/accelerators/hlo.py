"""Reads a compiled program as XLA prints it: instructions, how often they run, their bytes and estimated cycles."""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What computes and moves nothing. What an asynchronous operation does is counted where it starts.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
FAST_MEMORY = 1  # the number of the TPU's VMEM in a layout; what lies there is not in the device's main memory

_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8e\w+|c64|c128)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=([^\s,]+))")
_WRAPPERS = re.compile(r"^(?:\w+\()+|\)+$")
# Components of a name that JAX adds and that are no modules.
_ADDED = {
    *("while", "body", "cond", "closed_call", "core_call", "checkpoint", "remat", "rematted_computation", "shard_map"),
    *("custom_jvp_call", "custom_vjp_call", "pallas_call"),
}


class Array(NamedTuple):
    """An array of a program: type, dimensions, bytes in memory (with padding to tiles) and which memory it lies in."""

    type: str
    dims: tuple[int, ...]
    stored: int
    memory: int

    @property
    def bytes(self) -> int:
        """Bytes of the values alone."""
        return math.prod(self.dims) * _bits(self.type) // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: Of its result.
      opcode: Such as "fusion".
      arrays: What it makes; several for a tuple.
      operands: Names of the results that it reads.
      attributes: The rest of its line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def cycles(self) -> int:
        """The TPU compiler's own estimate; 0 where it gives none."""
        found = re.search(r'"?estimated_cycles"?:"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def op_name(self) -> str:
        """What JAX called the operation, '' if nothing."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Program:
    """A compiled program.

    Attributes:
      computations: Instructions by the name of their computation.
      entry: Name of the computation that runs.
      unknown_loops: Loops that count as one run of their body because the program does not say how often they run;
        `walk` fills it.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    unknown_loops: set[str] = field(default_factory=set)

    def walk(self) -> Iterator[tuple[Instruction, int, Mapping[str, Instruction]]]:
        """Yields what runs: an instruction, how often, and its neighbours by name.

        The inside of a fusion is one instruction. Of a conditional all branches count.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: str, times: int) -> Iterator[tuple[Instruction, int, Mapping[str, Instruction]]]:
        inside = self.computations[computation]
        for instruction in inside.values():
            called = {kind: name for kind, name in _CALLED.findall(instruction.attributes)}
            if instruction.opcode == "while":
                trips = self._trips(instruction, called["condition"], inside)
                yield from self._walk(called["body"], times * trips)
            elif instruction.opcode == "call":
                yield from self._walk(called["to_apply"], times)
            elif instruction.opcode == "conditional":
                for names in _BRANCHES.findall(instruction.attributes):
                    for name in re.findall(r"[\w.\-]+", " ".join(names)):
                        yield from self._walk(name, times)
            elif instruction.opcode not in FREE:
                yield instruction, times, inside

    def _trips(self, loop: Instruction, condition: str, around: Mapping[str, Instruction]) -> int:
        """Returns how often a loop runs: as XLA says, or as its condition compares a counter with a constant."""
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        inside = self.computations[condition]
        limits = [_constant(one) for one in inside.values() if one.opcode == "constant"]
        for one in inside.values():  # the limit may be carried from outside, where it is a constant
            index = re.search(r"index=(\d+)", one.attributes)
            if one.opcode == "get-tuple-element" and index and not limits:
                carried = around.get(around[loop.operands[0]].operands[int(index[1])])
                limits += [_constant(carried)] if carried is not None and carried.opcode == "constant" else []
        limits = [limit for limit in limits if limit]
        if len(limits) == 1 and any("direction=LT" in one.attributes for one in inside.values()):
            return limits[0]
        self.unknown_loops.add(loop.name)
        return 1


def parse(text: str) -> Program:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", {}
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            _, name, shape, opcode, rest = found.groups()
            operands, _, attributes = rest.partition(")")
            if opcode == "constant":
                attributes = f"value={operands},{attributes}"
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            inside[name] = Instruction(name, opcode, tuple(_arrays(shape)), names, attributes)
        elif header := _COMPUTATION.match(line):
            inside = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
    return Program(computations, entry)


def moved(instruction: Instruction, around: Mapping[str, Instruction], shares: Sequence[float] = ()) -> int:
    """Returns the bytes of main memory that an instruction reads and writes: operands and results, each once.

    Args:
      instruction: Of a program.
      around: Its neighbours by name.
      shares: Of the operands, the part that is read; all of each where none are given.
    """
    if instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode == "copy-start":  # its results are the copy, the original and a flag
        return sum(array.stored for array in instruction.arrays[:2] if array.memory != FAST_MEMORY)
    names = instruction.operands
    parts = shares if len(shares) == len(names) else (1.0,) * len(names)
    read = [(a, part) for name, part in zip(names, parts, strict=True) if name in around for a in around[name].arrays]
    total = sum(part * array.stored for array, part in read if array.memory != FAST_MEMORY)
    return round(total) + sum(array.stored for array in instruction.arrays if array.memory != FAST_MEMORY)


class Collective(NamedTuple):
    """One collective: its kind, what it returns on one device, its whole arrays, and how many devices take part."""

    kind: str
    returned: tuple[Array, ...]
    whole: tuple[Array, ...]
    devices: int


def collectives(program: Program) -> list[Collective]:
    """Returns what a program sends.

    The whole arrays of a gathering are its results, those of a reduction its operands. A collective that runs beside
    others stands in several fusions, each time with the same channel; it counts once. A TPU's reduce-scatter is a
    fusion that is named after the all-reduce in it.
    """
    found, seen = [], set()
    for computation, inside in program.computations.items():
        for each in inside.values():
            kind = each.opcode.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            which = (kind, channel[1] if channel else f"{computation}/{each.name}")
            if kind not in COLLECTIVES or which in seen:
                continue
            seen.add(which)
            returned = whole = each.arrays
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind, returned = "reduce-scatter", list(inside.values())[-1].arrays
            elif kind == "reduce-scatter":
                whole = tuple(array for name in each.operands for array in inside[name].arrays)
            elif each.opcode == "all-gather-start":
                returned = whole = each.arrays[len(each.arrays) // 2 :]
            found.append(Collective(kind, returned, whole, _group_size(each.attributes)))
    return found


def sent(program: Program) -> dict[str, dict[str, int]]:
    """Returns for every kind of collective how many there are ('count') and bytes of their whole arrays ('bytes')."""
    rows: dict[str, dict[str, int]] = {}
    for collective in collectives(program):
        row = rows.setdefault(collective.kind, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += sum(array.bytes for array in collective.whole)
    return rows


def _group_size(attributes: str) -> int:
    """How many devices take part in a collective together: three spellings of its replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{((?:'\w+',?)+)\}", attributes):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(lengths[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1


def module(op_name: str) -> tuple[str, str]:
    """Returns the Flax module that an operation belongs to and the pass, "forward" or "backward".

    What belongs to no module, such as augmentation, loss and optimizer, has the name "" and the pass "other".
    """
    first = op_name.split(";")[0]
    parts = []
    for part in first.split("/")[:-1]:  # the last one is the operation
        if part.startswith(("jit(", "pjit(", "vmap(", "jvp(", "transpose(")):
            part = _WRAPPERS.sub("", part) if not part.startswith(("jit(", "pjit(")) else ""
        if part and part not in _ADDED and not part[0].isupper() and "<" not in part and "." not in part:
            parts.append(part)
    if not parts:
        return "", "other"
    return "/".join(parts), "backward" if "transpose(" in first or "rematted_computation" in first else "forward"


def operation(instruction: Instruction) -> str:
    """Returns the kind of an operation: what JAX calls it, else XLA's opcode."""
    last = instruction.op_name.split(";")[0].rpartition("/")[2]
    return last if last and "[" not in last else instruction.opcode


def summed(rows: Iterable[tuple[Key, float]]) -> list[tuple[Key, float]]:
    """Adds the values of equal keys; the largest sum first."""
    total: dict[Key, float] = collections.defaultdict(float)
    for key, value in rows:
        total[key] += value
    return sorted(total.items(), key=lambda row: -row[1])


def _constant(instruction: Instruction) -> int:
    found = re.match(r"value=(\d+),", instruction.attributes)
    return int(found[1]) if found else 0


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(re.sub(r"\D", "", kind))


def _arrays(shape: str) -> Iterator[Array]:
    for kind, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        memory = re.search(r"S\((\d+)\)", layout)
        yield Array(kind, sizes, _stored(kind, sizes, layout), int(memory[1]) if memory else 0)


def _stored(kind: str, dims: tuple[int, ...], layout: str) -> int:
    """Bytes with the padding to the layout's first tile, such as `{1,0:T(8,128)(2,1)}`."""
    tile = re.search(r"T\(([\d,]+)\)", layout)
    order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis]
    sizes = [dims[axis] for axis in reversed(order)] if len(order) == len(dims) else list(dims)
    if tile:
        steps = [int(step) for step in tile[1].split(",")]
        for place, step in enumerate(reversed(steps[-len(sizes) :] if sizes else []), start=1):
            sizes[-place] = -(-sizes[-place] // step) * step
    return math.prod(sizes) * _bits(kind) // 8
