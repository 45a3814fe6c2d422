"""Accelerators that are not here: their makers' figures, their compilers, and what these say of a program."""
