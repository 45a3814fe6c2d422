"""The recipes that ship with maxmap, `configs/` in a checkout, and how a name or a path leads to a config file.

`maxmap/configs` is a link to that folder, so a wheel has the files inside of the package.
"""

import ast
import re
import runpy
from pathlib import Path
from typing import NamedTuple

from maxmap import storage
from maxmap.errors import UserError, nearest

FOLDER = Path(__file__).with_name("configs")
TABLES = ("RECIPES", "PRESETS", "HEADS")  # in a file with several recipes, the one that its argument is a name of


class ConfigFile(NamedTuple):
    """A Python file with a function `get_config`, and the argument of that function; None for none."""

    path: Path
    argument: str | None


class RecipeFile(NamedTuple):
    """A recipe's file: the first sentence of its docstring, and the arguments that it takes."""

    about: str
    arguments: tuple[str, ...]


def find(config: str) -> ConfigFile:
    """Finds a config: a recipe's name, such as 'finetune:small' or 'finetune.py:small', or the path of a file.

    Raises:
      UserError: There is neither such a file nor such a recipe.
    """
    file, colon, argument = config.partition(":")
    recipe = FOLDER / f"{file.removesuffix('.py')}.py"
    for path in (Path(storage.expand(file)), *[recipe] * (Path(file).name == file)):
        if path.is_file():
            return ConfigFile(path, argument if colon else None)
    near = nearest(Path(file).stem, names())
    raise UserError(f"there is no config file {file}, nor a recipe of this name; the nearest recipes are {near}.")


def names() -> list[str]:
    """Returns the names of the recipes' files, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def describe(name: str) -> RecipeFile:
    """Runs a recipe's file, and returns what it is for and which arguments it takes."""
    path = FOLDER / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    about = re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]
    variables = runpy.run_path(str(path))
    tables = [variables[table] for table in TABLES if table in variables]
    return RecipeFile(about, tuple(tables[0]) if tables else ())
