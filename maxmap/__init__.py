"""maxmap: hybrid vision models with multi-branch pooling heads in JAX and Flax."""

from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.features import FeatureInfo, feature_info, intermediates
from maxmap.heads.gramian import GramianHead
from maxmap.heads.linear import LinearHead
from maxmap.heads.map import MAPHead
from maxmap.inference import load, predict, preprocess
from maxmap.models import Classifier, average, create_model, fuse, list_models

__all__ = [
    "Classifier",
    "FeatureInfo",
    "GramianHead",
    "LinearHead",
    "MAPHead",
    "UserError",
    "average",
    "create_model",
    "feature_info",
    "from_torch",
    "fuse",
    "intermediates",
    "list_models",
    "load",
    "predict",
    "preprocess",
    "to_torch",
]
