"""MaxViT, CoAtNet, CoAtNeXt, MaxxViT and MaxxViT-V2: convolution stages and multi-axis attention.

Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer"; Dai et al. 2021, "CoAtNet". Names, fields and parameters are
those of timm 1.0.31; the `tf` variants follow the official TensorFlow code.
"""

from maxmap.backbones.maxxvit.backbone import MaxxViT
from maxmap.backbones.maxxvit.variants import VARIANTS

__all__ = ["VARIANTS", "MaxxViT"]
