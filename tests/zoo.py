"""What the tests of backbones and heads share."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from maxmap.convert.torch import from_torch, to_torch
from maxmap.models import FAMILIES, MODELS
from tests.reference import fill

# Has XLA optimise little: for programs that compile far longer than they run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick(function: Callable[..., Any], *args: Any, level: int = 0) -> Any:
    """Calls a function under jit, compiled with little optimisation; `level` 1 where it computes for long."""
    return jax.jit(function, compiler_options=QUICK | {"xla_backend_optimization_level": level})(*args)


def named(family: str, head: str = "linear|map") -> set[str]:
    """Names of the models on a family's backbones (all for "") with one of these heads."""
    backbones = set().union(*FAMILIES.values()) if not family else set(FAMILIES[family])
    return {name for name, model in MODELS.items() if model.backbone in backbones and model.head["name"] in head}


def run(model: nn.Module, x: jax.Array, *, train: bool = False) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """A model's features and outputs; a method for `model.apply`."""
    features = model.backbone(x, train=train)
    return features, model.head(features, train=train)


def with_gradients(function: Callable[..., Any], direction: Any, *args: Any) -> tuple[Any, tuple[Any, ...]]:
    """A function's result and, for the gradient `direction` of the result, the gradients of its arguments."""

    def run(*args: Any) -> tuple[Any, tuple[Any, ...]]:
        y, vjp = jax.vjp(function, *args)
        return y, vjp(direction)

    return quick(run, *args)


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Normally distributed numbers, in float64."""
    return np.random.default_rng(seed).standard_normal(shape)


def filled(model: nn.Module, size: Sequence[int]) -> dict[str, Any]:
    """Random variables of a model by the rule of the golden files, in float64."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    named = to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), model)
    return from_torch({key: fill(key, value.shape).astype(np.float64) for key, value in named.items()}, model)


def randomised(reference: Any) -> tuple[Any, dict[str, Any]]:
    """Fills every leaf of a torch model in the same way; returns it, evaluating, and its state dict."""
    import torch

    weights = {
        key: torch.from_numpy(fill(key, value.shape)).double()
        for key, value in reference.state_dict().items()
        if value.is_floating_point()  # not the counters of batches and the indices
    }
    unknown = reference.double().load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown
    return reference.eval(), weights


def nchw(x: np.ndarray) -> Any:
    """Images as torch takes them."""
    import torch

    return torch.from_numpy(x.transpose(0, 3, 1, 2))


def nhwc(x: Any) -> np.ndarray:
    """Torch's maps as we have them."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(ours: Any, wanted: Any) -> float:
    """The largest difference relative to the largest value; both are float64."""
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    assert ours.shape == wanted.shape
    assert ours.dtype == np.float64
    return np.abs(ours - wanted).max() / np.abs(wanted).max()


def assert_close(ours: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    """Compares arrays of one shape; `tolerance` is relative to the largest value."""
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() <= tolerance * np.abs(wanted).max()


def assert_same_moments(ours: Mapping[str, np.ndarray], reference: Mapping[str, Any]) -> None:
    """Compares the initial values of state dicts, by leaf and by kind of leaf: names that differ in numbers alone.

    Sums and sums of squares agree within five standard errors, constants exactly.
    """
    groups = {key: [key] for key in ours}
    for key in ours:
        groups.setdefault(f"{re.sub(r'[0-9]+', '*', key)} (all)", []).append(key)
    for name, keys in groups.items():
        a = np.concatenate([ours[key].ravel() for key in keys]).astype(np.float64)
        b = np.concatenate([reference[key].numpy().ravel() for key in keys]).astype(np.float64)
        if b.std() == 0:
            assert np.array_equal(a, b), name
            continue
        for power in (1, 2):
            noise = np.sqrt(np.sum(a ** (2 * power)) + np.sum(b ** (2 * power)))
            assert abs(np.sum(a**power) - np.sum(b**power)) < 5 * noise, (name, power, a.std(), b.std())
