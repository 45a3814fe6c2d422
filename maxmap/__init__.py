"""maxmap: hybrid vision models with multi-branch pooling heads in JAX and Flax.

A name is imported when it is first used, so that `import maxmap`, and commands that do not compute, start at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxmap.convert.torch import from_torch, to_torch
    from maxmap.errors import UserError
    from maxmap.explanation import Explanation, explain
    from maxmap.features import FeatureInfo, feature_info, intermediates
    from maxmap.heads.gramian import GramianHead
    from maxmap.heads.linear import LinearHead
    from maxmap.heads.map import MAPHead
    from maxmap.inference import load, predict, preprocess
    from maxmap.models import Classifier, average, create_model, fuse, list_models

__all__ = [
    "Classifier",
    "Explanation",
    "FeatureInfo",
    "GramianHead",
    "LinearHead",
    "MAPHead",
    "UserError",
    "average",
    "create_model",
    "explain",
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

_MODULES = {
    "maxmap.convert.torch": ("from_torch", "to_torch"),
    "maxmap.errors": ("UserError",),
    "maxmap.explanation": ("Explanation", "explain"),
    "maxmap.features": ("FeatureInfo", "feature_info", "intermediates"),
    "maxmap.heads.gramian": ("GramianHead",),
    "maxmap.heads.linear": ("LinearHead",),
    "maxmap.heads.map": ("MAPHead",),
    "maxmap.inference": ("load", "predict", "preprocess"),
    "maxmap.models": ("Classifier", "average", "create_model", "fuse", "list_models"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take every name for one that this function has

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'maxmap' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
