"""Cycles of Pallas kernels for TPUs, which the compiled program does not tell.

The TPU's compiler writes the schedule of a kernel: a list of bundles, each of them a cycle unless it waits for memory.
One bundle list is the body of the kernel's grid and runs once for every program of the grid. Each kernel is compiled by
itself, in a process that asks the compiler for its schedule; for a whole network that would take longer than compiling.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.sharding import SingleDeviceSharding

from maxmap.accelerators import hlo, topology
from maxmap.kernels.target import kernel_calls, kernel_name

TARGET = "tpu_custom_call"
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(\w\w)?\s*:\s*(>*)\s*\{(\})?")


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a traced program.

    Attributes:
      name: That it was given.
      programs: Of its grid; None where the grid is not known before it runs.
      loops: Of its body, outermost first: depth from 1, and how often it runs or None.
      operands: Dimensions of its operands.
      shares: Of each operand's elements, those that all programs read together, at most 1.
      equation: Of the traced program.
    """

    name: str
    programs: int | None
    loops: tuple[tuple[int, int | None], ...]
    operands: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]
    equation: Any

    def matches(self, call: hlo.Instruction, operands: Sequence[tuple[int, ...]]) -> bool:
        """Whether a custom call with operands of these dimensions is this kernel."""
        named = re.sub(r"(\.\d+|\.remat\d*|\.clone)+$", "", call.name) == self.name
        return (named or f"/{self.name}/" in call.op_name) and tuple(operands) == self.operands


@dataclass(frozen=True)
class Schedule:
    """What a kernel's schedule says.

    Attributes:
      cycles: Of all programs.
      bundles: Of one program, the loops inside counted as often as they run where that is known.
      complete: False where some loop counts once because nothing says how often it runs.
    """

    cycles: int
    bundles: int
    complete: bool


def kernels(jaxpr: Any) -> list[Kernel]:
    """Returns the kernels of a traced program, each once."""
    found: dict[tuple[Any, ...], Kernel] = {}
    for equation in kernel_calls(jaxpr):
        mapping = equation.params["grid_mapping"]
        programs = math.prod(mapping.grid) if all(isinstance(size, int) for size in mapping.grid) else None
        operands = tuple(tuple(variable.aval.shape) for variable in equation.invars)
        kernel = Kernel(
            kernel_name(equation),
            programs,
            tuple(_loops(equation.params["jaxpr"], 1)),
            operands,
            _shares(mapping, programs, operands),
            equation,
        )
        found.setdefault((kernel.name, kernel.programs, kernel.operands), kernel)
    return list(found.values())


def schedules(found: Sequence[Kernel], hardware: str) -> list[Schedule | str]:
    """Compiles kernels for some TPU; returns of each its schedule, or a sentence that says why there is none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: list[Schedule | str] = []
        for number, kernel in enumerate(found):
            try:
                (folder / f"{number}.kernel").write_bytes(_exported(kernel))
            except Exception as error:  # whatever JAX says of a kernel that it does not export
                (folder / f"{number}.error").write_text(str(error)[:200], encoding="utf-8")
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        arguments = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}".strip()
        finished = subprocess.run(
            [sys.executable, "-m", "maxmap.accelerators.bundles", hardware, name],
            env={**os.environ, "LIBTPU_INIT_ARGS": arguments, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, kernel in enumerate(found):
            path, complaint = folder / f"{number}.json", folder / f"{number}.error"
            if path.is_file():
                text = Path(json.loads(path.read_text("utf-8"))).read_text("utf-8", errors="replace")
                results.append(read(text, kernel.programs or 1, kernel.loops))
            else:
                said = complaint.read_text("utf-8") if complaint.is_file() else finished.stderr.strip()[-200:]
                results.append(f"kernel {kernel.name} does not compile by itself ({' '.join(said.split())})")
    return results


def read(text: str, programs: int, loops: Sequence[tuple[int, int | None]]) -> Schedule:
    """Reads the bundles of a kernel.

    Args:
      text: The file `*-final_bundles.txt` of the compiler.
      programs: Of the grid.
      loops: See `Kernel`; they multiply their bundles if the schedule has loops at the same depths in the same order.
    """
    counts, depths = _count_bundles(text)
    grid = [(1, programs)] if programs > 1 and len(depths) > 1 else []
    expected = [*grid, *((depth + len(grid), trips) for depth, trips in loops)]
    known = depths[1:] == [depth for depth, _ in expected] and all(trips for _, trips in expected)
    trips = [times or 1 for _, times in expected] if known else [1] * (len(depths) - 1)
    if grid and not known:
        trips[0] = programs  # the first loop is the grid's
    cycles, times_at = counts[0], [1]
    for count, depth, times in zip(counts[1:], depths[1:], trips, strict=True):
        del times_at[depth:]
        times_at.append(times_at[-1] * times)
        cycles += count * times_at[-1]
    unrolled = len(depths) - 1 == len(grid)  # whatever the kernel says: there is no loop left
    return Schedule(cycles, (cycles - counts[0]) // programs if grid else cycles, known or unrolled)


def _count_bundles(text: str) -> tuple[list[int], list[int]]:
    """Returns the bundles and the depth of what is outside of loops and of every loop, as they follow one another."""
    counts, depths, stack = [0], [0], [0]  # the stack holds the loops that a line is in
    inside = [-1]  # the last loop that started in each
    header = False
    for line in text.splitlines():
        if not (found := _BUNDLE.match(line)):
            continue
        label, depth = found[1], len(found[2])
        if found[3]:  # an empty bundle has no marks
            depth = len(stack) - 1
        del stack[depth + 1 :]
        starts = label in ("LH", "LB") and not header
        if depth and (len(stack) <= depth or starts):
            del stack[depth:]
            while len(stack) <= depth:
                # A single bundle in the middle of a loop may stand as if outside: what has no label goes on.
                if starts or inside[stack[-1]] < 0:
                    inside[stack[-1]] = len(counts)
                    counts.append(0)
                    depths.append(len(stack))
                    inside.append(-1)
                stack.append(inside[stack[-1]])
        counts[stack[-1]] += 1
        header = label == "LH"
    return counts, depths


def _shares(mapping: Any, programs: int | None, operands: Sequence[tuple[int, ...]]) -> tuple[float, ...]:
    """Returns `Kernel.shares`; 1 where it is not known."""
    blocks = [block.block_shape for block in mapping.block_mappings[: len(operands)]]
    if programs is None or len(blocks) < len(operands):
        return (1.0,) * len(operands)
    sizes = [math.prod(getattr(side, "block_size", 1) for side in block) for block in blocks]
    return tuple(
        min(1.0, programs * size / max(math.prod(shape), 1)) for size, shape in zip(sizes, operands, strict=True)
    )


def _loops(jaxpr: Any, depth: int) -> Iterator[tuple[int, int | None]]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inside = depth
        if equation.primitive.name in ("scan", "while"):
            length = equation.params.get("length")
            yield depth, None if length is None else length // equation.params.get("unroll", 1)
            inside = depth + 1
        for name, value in equation.params.items():
            if name == "cond_jaxpr":
                continue
            for inner in jax.tree.leaves(value, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from _loops(inner, inside)


def _exported(kernel: Kernel) -> bytes:
    equation = kernel.equation
    shapes = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
    call = jax.jit(lambda *arrays: equation.primitive.bind(*arrays, **equation.params))
    safe = [export.DisabledSafetyCheck.custom_call(TARGET)]
    return bytes(export.export(call, platforms=["tpu"], disabled_checks=safe)(*shapes).serialize())


def _compile_all(hardware: str, folder: Path) -> None:
    """Compiles the kernels in a folder; writes beside each where the compiler wrote its bundles."""
    sharding = SingleDeviceSharding(topology.devices_of(hardware, 1)[0])
    jax.config.update("jax_enable_compilation_cache", False)
    for path in sorted(folder.glob("*.kernel")):
        before = set(folder.iterdir())
        try:
            kernel = export.deserialize(bytearray(path.read_bytes()))
            shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in kernel.in_avals]
            program = hlo.parse(jax.jit(kernel.call).lower(*shapes).compile().as_text() or "")
            (call,) = [one for one, _, _ in program.walk() if one.target == TARGET]
            new = set(folder.glob("*-final_bundles.txt")) - before
            (bundles,) = [one for one in new if re.search(rf"-{re.escape(call.name)}-\d+-final_bundles.txt$", one.name)]
            path.with_suffix(".json").write_text(json.dumps(str(bundles)), encoding="utf-8")
        except Exception as error:  # the compiler's words go into the report
            path.with_suffix(".error").write_text(str(error)[:200], encoding="utf-8")


if __name__ == "__main__":
    _compile_all(sys.argv[1], Path(sys.argv[2]))
