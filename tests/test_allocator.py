"""Memory that is freed stays with the process, where JAX computes on the CPU and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxmap import allocator

# Whole pages of the 64 MB that a step takes. The first and the last may hold another block too, with which they stay.
PAGES = 16384 - 2

PROGRAM = """
import ctypes, resource, sys, time
import jax, jax.numpy as jnp, numpy as np
from maxmap import allocator

assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: no huge pages, a fault is one of 4 kB
if sys.argv[1] != "return":
    assert allocator.keep_freed_memory()
if sys.argv[1] == "full":
    allocator.available = lambda: 1
if sys.argv[1] == "compiled":
    allocator.available = lambda: 1 << 30
    np.ones(1 << 28)  # 2 GB, for which there is no room a second time, and free before the first step

@jax.jit
def product(x):
    return jnp.sin(jnp.outer(x, x)) @ x  # the left side fills 64 MB

def faults(size, wait=0):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    product(jnp.ones(size)).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    time.sleep(wait)
    allocator.relieve()
    return faults

print(sum([faults(4096) for _ in range(40)][20:]))
faults(12288, wait=2)  # the process grows by 576 MB, which XLA frees soon after
print(faults(4096))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("memory", ["keep", "compiled", "return", "full"])
def test_steps_take_no_pages_from_the_kernel_until_the_process_has_grown(memory: str) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", PROGRAM, memory]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    faults, relieved = map(int, output.split())
    # On a busy machine XLA may free a step's memory after the next one has begun, which then takes its own, once.
    assert faults < 4 * PAGES if memory in ("keep", "compiled") else faults >= 20 * PAGES
    assert relieved >= PAGES  # given back, or never kept: the pages are taken anew


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's control groups")
def test_a_control_group_leaves_what_it_has_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocator, "_GROUP", tmp_path)
    machine = allocator.available()  # there is no group
    for name, text in {"max": "1000000", "current": "600000", "stat": "anon 500000\ninactive_file 70000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert allocator.available() == 470_000  # files that were read can be dropped
    (tmp_path / "memory.max").write_text("max")
    assert allocator.available() == pytest.approx(machine, rel=0.5)


def test_nothing_is_kept_where_an_accelerator_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not allocator.keep_freed_memory()
