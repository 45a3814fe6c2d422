"""The command recipes, which needs nothing but the recipes' files."""

import argparse
import textwrap

from maxmap import recipe_files

_WIDTH = 100  # characters of a line


def add_recipes(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `recipes`."""
    command.set_defaults(run=recipes_command)


def recipes_command() -> None:
    """Prints the recipes: the names that --config takes, and the first sentence of each file."""
    for name in recipe_files.names():
        about, arguments = recipe_files.describe(name)
        print(f"{name}:NAME" if arguments else name)
        print(textwrap.fill(about, _WIDTH, initial_indent="    ", subsequent_indent="    "))
        if arguments:
            text = f"NAME is one of {', '.join(arguments)}"
            print(textwrap.fill(text, _WIDTH, initial_indent="    ", subsequent_indent="      "))
