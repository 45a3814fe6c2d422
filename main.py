"""Trains or evaluates: python main.py --config=configs/maxvit_tiny_map.py --workdir=runs/maxvit [--mode=eval]

--config.KEY=VALUE changes a value of the config, for example --config.batch_size=256; --help_config lists the keys.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from maxmap import evaluate, runtime
from maxmap.config import bind, explain, read, split_overrides
from maxmap.errors import UserError, sentence
from maxmap.sharding import initialize_processes
from maxmap.train import loop

CONFIG = flags.DEFINE_string("config", None, "Config file, such as configs/quickstart.py.")
HELP = flags.DEFINE_bool("help_config", False, "List every key of the config: value, type, default and meaning.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same one again goes on with it.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate the newest checkpoint.")
CHANGES = flags.DEFINE_bool("continue_with_changes", False, "Go on although the config changed what is computed.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, where nothing else tells it.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, and returns the program's name and the overrides of the config."""
    rest, overrides = split_overrides(argv)
    try:
        if unknown := flags.FLAGS(rest)[1:]:
            raise UserError(f"'{unknown[0]}' is no flag: write --config=FILE and --workdir=FOLDER.")
        if CONFIG.value is None:
            raise UserError("say which config: --config=configs/quickstart.py, or another file in configs/.")
    except (UserError, flags.Error) as error:
        sys.exit(stop(error))
    return [argv[0], *overrides]


def stop(error: Exception) -> int:
    """Prints one sentence and returns the exit code of a user's mistake."""
    print(f"maxmap: {sentence(error)}", file=sys.stderr)
    return 2


def main(argv: list[str]) -> int:
    """Runs what the flags say with the overrides in `argv`, and returns the exit code."""
    logging.set_verbosity(logging.ERROR)  # orbax logs every file that it writes
    try:
        config = read(str(CONFIG.value), argv[1:])
        if HELP.value:
            print(explain(config))
            return 0
        recipe = bind(config)
        workdir = WORKDIR.value or f"runs/{Path(str(CONFIG.value).partition(':')[0]).stem}"
        initialize_processes(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        if MODE.value == "train":
            result = loop.run(recipe, workdir, allow_changes=CHANGES.value)
        else:
            result = evaluate.run(recipe, workdir)
    except UserError as error:
        return stop(error)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    runtime.prepare()
    app.run(main, flags_parser=parse)
