"""Trains or evaluates, as `python -m maxmap train` does: python main.py --config=RECIPE --workdir=FOLDER [--mode=eval]

--config.KEY=VALUE changes a value of the config, for example --config.batch_size=256; --help_config lists the keys.
"""

import sys

from maxmap.__main__ import start

if __name__ == "__main__":
    start(["train", *sys.argv[1:]])
