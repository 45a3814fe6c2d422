"""Trains or evaluates: python main.py --config=configs/maxvit_tiny_map.py --workdir=runs/maxvit [--mode=eval]

Any value of the config can be set on the command line, for example --config.batch_size=256.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from maxmap import evaluate, runtime, train
from maxmap.errors import UserError, nearest
from maxmap.sharding import initialize_processes

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.KEY=VALUE overrides a value.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same one again goes on with it.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate the newest checkpoint.")
CHANGES = flags.DEFINE_bool("continue_with_changes", False, "Go on although the config changed what is computed.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, where nothing else tells it.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; what is wrong with them is the user's to mend."""
    try:
        check_config(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"'{rest[1]}' is no flag: write --config=FILE and --workdir=FOLDER.")
    except (flags.Error, TypeError, ValueError) as error:
        sys.exit(stop(error))
    return rest


def check_config(argv: list[str]) -> None:
    """Raises UserError unless there is a config file, and it has every key that the command line sets."""
    path = next((arg.split("=", 1)[1] for arg in argv if re.match("--?config=", arg)), None)
    if path is None:
        if not any(re.fullmatch("--?help(short|full|xml)?", arg) for arg in argv):
            raise UserError("say which config: --config=configs/quickstart.py, or another file in configs/.")
        return
    file, *argument = path.split(":", 1)
    if not Path(file).is_file():
        known = [str(p) for p in Path(__file__).with_name("configs").glob("*.py")]
        raise UserError(f"there is no config file {file}; the nearest are {nearest(file, known)}.")
    config = runpy.run_path(file)["get_config"](*argument)
    for arg in argv:
        if match := re.match(r"--?config\.([\w.]+)", arg):
            section = config
            for i, key in enumerate(match[1].split(".")):
                if not isinstance(section, ConfigDict) or key not in section:
                    where = ".".join(["config", *match[1].split(".")[:i]])
                    has = ", ".join(section) if isinstance(section, ConfigDict) else "no keys"
                    raise UserError(f"{where} has no key '{key}', which {arg} sets; it has {has}.")
                section = section[key]


def stop(error: Exception) -> int:
    """Prints one sentence and returns the exit code of a user's mistake."""
    print(f"maxmap: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def main(argv: list[str]) -> int:
    del argv
    logging.set_verbosity(logging.ERROR)  # orbax tells about every file that it writes
    workdir = WORKDIR.value or f"runs/{Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem}"
    try:
        initialize_processes(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        config = CONFIG.value.to_dict()
        if MODE.value == "train":
            result = train.run(config, workdir, allow_changes=CHANGES.value)
        else:
            result = evaluate.run(config, workdir)
    except UserError as error:
        return stop(error)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    runtime.prepare()
    app.run(main, flags_parser=parse)
