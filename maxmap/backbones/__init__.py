"""Backbones: images `[B, H, W, C]` in, a list of NHWC feature maps out; one file per family."""
