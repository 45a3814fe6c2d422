"""Layers: primitives, blocks that a paper gave a name, and what pooling heads need; nothing here knows a model."""
