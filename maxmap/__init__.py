"""maxmap: hybrid vision models with multi-branch pooling heads in JAX and Flax."""

from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.inference import load, predict, preprocess
from maxmap.models import Classifier, average, create_model, list_models

__all__ = [
    "Classifier",
    "UserError",
    "average",
    "create_model",
    "from_torch",
    "list_models",
    "load",
    "predict",
    "preprocess",
    "to_torch",
]
