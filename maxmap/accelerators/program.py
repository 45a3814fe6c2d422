"""Compiles a program for an accelerator that is not here, and reports what its compiler says of it.

A TPU's compiler estimates the cycles of every fusion, copy and convolution that runs; over the chip's clock they are
the time. It does not estimate Pallas kernels: their cycles follow from their schedules (`bundles`), and are at least
those that their operands and results take from and to memory. A GPU's compiler estimates nothing: the time is that of
the bytes that every instruction reads and writes at the memory's bandwidth. Collectives are counted, their time is not.
"""

import ast
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from maxmap.accelerators import bundles, hlo, topology
from maxmap.accelerators.hardware import HARDWARE
from maxmap.errors import UserError, shortened
from maxmap.operations import compiled_for

PARTS = 25  # rows of the report's tables
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Lowered(NamedTuple):
    """A program for some hardware that is not compiled yet."""

    hardware: str
    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    seconds: float  # that it took


def lower_for(hardware: str, function: jax.stages.Wrapped, *arguments: Any) -> Lowered:
    """Traces a function for some hardware.

    Args:
      hardware: A key of `HARDWARE`.
      function: Jitted; it is traced as for that hardware.
      arguments: Shapes, types and shardings over devices of `topology.devices_of`.
    """
    began = time.perf_counter()
    with compiled_for(HARDWARE[hardware].platform):
        traced = function.trace(*arguments)
    return Lowered(hardware, traced, traced.lower(), time.perf_counter() - began)


def digest(program: Lowered) -> str:
    """Returns a digest of what a report follows from.

    That is the program, the hardware, the compiler with its flags, and how `maxmap.accelerators` counts.
    """
    parts = [program.lowered.as_text(), program.hardware, topology.compiler(program.hardware), jax.__version__]
    parts.append(str(sorted(topology.options_of(program.hardware).items())))
    parts += [os.environ.get(name, "") for name in _FLAGS]
    parts += [ast.unparse(ast.parse(path.read_text("utf-8"))) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compile_for(hardware: str, function: jax.stages.Wrapped, *arguments: Any) -> tuple[dict[str, Any], str]:
    """Traces and compiles a function; see `lower_for` and `compile_lowered`."""
    return compile_lowered(lower_for(hardware, function, *arguments))


def compile_lowered(program: Lowered) -> tuple[dict[str, Any], str]:
    """Compiles a program and reports what the compiler says.

    Returns:
      The report of `report`, with 'compile_seconds' and 'compiler', and the text of the compiled program.

    Raises:
      UserError: The program does not fit into the memory of the hardware, as its compiler says.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # what is read from there was compiled without dumps
    hardware, traced, lowered, seconds = program
    began = time.perf_counter()
    try:
        compiled: Any = lowered.compile(compiler_options=topology.options_of(hardware))
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_fit(hardware, error) or error from None
    seconds += time.perf_counter() - began
    text = compiled.as_text() or ""
    found = report(text, hardware, bundles.kernels(traced.jaxpr))
    sizes, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    found["memory"] = {
        "arguments": sizes.argument_size_in_bytes,
        "results beside them": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
    }
    found["fits"] = sum(found["memory"].values()) <= HARDWARE[hardware].memory
    found["bytes_accessed"] = costs.get("bytes accessed")
    return {**found, "compiler": topology.compiler(hardware), "jax": jax.__version__, "compile_seconds": seconds}, text


def report(text: str, hardware: str, kernels: Sequence[bundles.Kernel] = ()) -> dict[str, Any]:
    """Reports what the text of a compiled program says.

    Args:
      text: Of a program for one device.
      hardware: That it is compiled for.
      kernels: The Pallas kernels in it.

    Returns:
      'seconds', an estimate; 'cycles' (None on a GPU); 'bytes' read from and written to the device's main memory, by
      operands and results; 'collectives', see `hlo.sent`; 'kernels', 'parts' (by module and pass) and
      'operations' (by kind), each a list of rows with 'share' of the time; 'not_counted', sentences.
    """
    machine, program = HARDWARE[hardware], hlo.parse(text)
    runs = list(program.walk())
    moved = [times * hlo.moved(one, around) for one, times, around in runs]
    not_counted = [f"loop {name} counts once: how often it runs is not known" for name in program.unknown_loops]
    rows: list[dict[str, Any]] = []
    if machine.clock is None:
        weights = [float(value) for value in moved]
        seconds, cycles = sum(weights) / machine.memory_bandwidth, None
    else:
        rows, cycles_of, more = _kernel_cycles(runs, hardware, kernels)
        not_counted += more
        weights = [cycles_of.get(at, float(times * one.cycles)) for at, (one, times, _) in enumerate(runs)]
        cycles = sum(weights)
        seconds = cycles / machine.clock
    whole = sum(weights) or 1.0
    by_module = hlo.summed((hlo.module(one.op_name), weight) for (one, _, _), weight in zip(runs, weights, strict=True))
    by_kind = hlo.summed((hlo.operation(one), weight) for (one, _, _), weight in zip(runs, weights, strict=True))
    return {
        "seconds": seconds,
        "cycles": cycles,
        "bytes": sum(moved),
        "collectives": hlo.sent(program),
        "instructions": len(runs),
        "kernels": rows,
        "parts": [{"module": name, "pass": way, "share": value / whole} for (name, way), value in by_module],
        "operations": [{"operation": name, "share": value / whole} for name, value in by_kind],
        "not_counted": not_counted,
    }


def describe(found: dict[str, Any], hardware: str, rows: int = PARTS) -> list[str]:
    """Returns lines that say what a report holds, `rows` of each table."""
    machine = HARDWARE[hardware]
    memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found["memory"].items())
    total, room = sum(found["memory"].values()) / 1e9, machine.memory / 1e9
    fits = "" if found["fits"] else ": DOES NOT FIT; raise fsdp or accumulate, or set model.remat"
    lines = [f"memory per device: {total:.2f} of {room:.0f} GB ({memory}){fits}"]
    milliseconds = 1e3 * found["seconds"]
    if machine.clock is None:
        lines.append(
            f"{milliseconds:.2f} ms: {found['bytes'] / 1e9:.2f} GB that its {found['instructions']:,} instructions "
            f"read and write, at {machine.memory_bandwidth / 1e12:.2f} TB/s; this compiler estimates no time"
        )
    else:
        lines += [
            f"{milliseconds:.2f} ms: {found['cycles'] / 1e6:.2f} Mcycles at {machine.clock / 1e9:.2f} GHz",
            f"{found['bytes'] / 1e9:.2f} GB read from and written to main memory "
            f"({(found['bytes_accessed'] or 0) / 1e9:.2f} GB as XLA counts, on-chip memory included)",
        ]
    for kind, row in found["collectives"].items():
        lines.append(f"{row['count']} {kind}, {row['bytes'] / 1e9:.3f} GB; their time does not count")
    for row in found["kernels"]:
        partly = "" if row["complete"] else ", loops inside counted once"
        lines.append(
            f"kernel {row['name']}: {row['calls']} x {row['cycles'] / 1e6:.3f} Mcycles ({row['bundles']:,} bundles x "
            f"{row['programs']:,} programs{partly}; {row['memory_cycles'] / 1e6:.3f} for its memory)"
        )
    lines += found["not_counted"]
    lines += ["", "dearest parts:"]
    for row in found["parts"][:rows]:
        name = row["module"] or "augmentation, loss, optimizer and the rest"
        lines.append(f"  {100 * row['share']:5.1f} %  {row['pass']:8}  {name}")
    lines += ["dearest operations:"]
    lines += [f"  {100 * row['share']:5.1f} %  {row['operation']}" for row in found["operations"][: rows // 2]]
    return lines


def _kernel_cycles(
    runs: Sequence[tuple[hlo.Instruction, int, Any]], hardware: str, kernels: Sequence[bundles.Kernel]
) -> tuple[list[dict[str, Any]], dict[int, float], list[str]]:
    """Returns a row for every Pallas kernel, the cycles of its calls by their place in `runs`, and what is missing."""
    calls = [at for at, (one, _, _) in enumerate(runs) if one.target == bundles.TARGET]
    if not calls:
        return [], {}, []
    machine = HARDWARE[hardware]
    cycles_per_byte = (machine.clock or 0) / machine.memory_bandwidth
    found = bundles.schedules(kernels, hardware)
    rows: dict[int, dict[str, Any]] = {}
    cycles: dict[int, float] = {}
    missing = []
    for at in calls:
        one, times, around = runs[at]
        operands = [around[name].arrays[0].dims for name in one.operands if name in around]
        which = next((n for n, kernel in enumerate(kernels) if kernel.matches(one, operands)), None)
        shares = () if which is None else kernels[which].shares
        memory = hlo.moved(one, around, shares) * cycles_per_byte
        schedule = f"kernel {one.name} is not among those that were traced" if which is None else found[which]
        if which is None or isinstance(schedule, str):
            missing.append(f"{schedule}: of it only the time of its memory counts")
            cycles[at] = times * memory
            continue
        cycles[at] = times * max(schedule.cycles, memory)
        row = rows.setdefault(
            which,
            {
                "name": kernels[which].name,
                "calls": 0,
                "programs": kernels[which].programs,
                "bundles": schedule.bundles,
                "cycles": max(schedule.cycles, memory),
                "memory_cycles": memory,
                "complete": schedule.complete and kernels[which].programs is not None,
            },
        )
        row["calls"] += times
    return list(rows.values()), cycles, list(dict.fromkeys(missing))


def _does_not_fit(hardware: str, error: Exception) -> UserError | None:
    """Returns a sentence for the compiler's complaint that memory ends; None for another error."""
    kind, _, said = str(error).partition(": ")
    if kind != "RESOURCE_EXHAUSTED":
        return None
    why = shortened(said.splitlines()[0].rstrip("."), 200)
    mend = "raise fsdp or accumulate, or set model.remat"
    return UserError(f"the program does not fit a {hardware}, says its compiler ({why}): {mend}.")
