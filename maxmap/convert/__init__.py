"""Checkpoints of other frameworks: in and out."""
