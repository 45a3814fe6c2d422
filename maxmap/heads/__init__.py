"""Heads: a list of NHWC feature maps in, branches of logits `[G, B, K]` out."""
