"""The commands keep the programs that they compile, where they say and nowhere else."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

# What a command does before anything else, and then a program that compiles within a second.
PROGRAM = """
import jax
from maxmap import compiled

compiled.keep()
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


def run(command: list[str], home: Path, **settings: str) -> None:
    """Runs a command as a user who has set nothing but this."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_"))}
    environment = {**own, "HOME": str(home), "JAX_PLATFORMS": "cpu", **settings}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, check=True)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({}, ".cache/maxmap/xla"),
        ({"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/maxmap/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "{home}/own"}, "own"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}, None),
    ],
    ids=["home", "xdg", "folder", "off", "long"],
)
def test_programs_are_kept_where_the_user_says(settings, where, tmp_path):
    run(["-c", PROGRAM], tmp_path, **{key: each.format(home=tmp_path) for key, each in settings.items()})
    assert {path.parent for path in tmp_path.rglob("*-cache")} == ({tmp_path / where} if where else set())


@pytest.mark.parametrize("command", [["main.py", "--helpshort"], ["-m", "maxmap", "list", "maxvit_mini_32"]])
def test_the_commands_keep_programs(command, tmp_path):
    told = tmp_path / "told"
    (tmp_path / "sitecustomize.py").write_text(  # at the end of the command JAX tells where it keeps them
        "import atexit, pathlib, sys\n"
        "@atexit.register\n"
        "def tell():\n"
        f"    pathlib.Path({str(told)!r}).write_text(sys.modules['jax'].config.jax_compilation_cache_dir)\n"
    )
    with contextlib.suppress(subprocess.CalledProcessError):  # absl's help ends with 1
        run(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert told.read_text() == str(tmp_path / ".cache/maxmap/xla")
