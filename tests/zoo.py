"""What the tests of backbones and heads share."""

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn
from flax import traverse_util
from flax.core.scope import Scope
from flax.errors import InvalidRngError

from maxmap.convert.torch import from_torch, to_torch
from maxmap.convert.verify import keeping_float64
from maxmap.layers import residual
from maxmap.layers.primitives import DropPath, pair
from maxmap.models import FAMILIES, MODELS
from maxmap.shapes import eval_shape_of_init
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


def pyramid(size: int, strides: Sequence[int], channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the feature maps of one square image."""
    return [(1, size // stride, size // stride, c) for stride, c in zip(strides, channels, strict=True)]


def traced(model: nn.Module) -> tuple[dict[tuple[str, ...], int], list[tuple[int, ...]]]:
    """Sizes of a model's variables, by path, and shapes of its features at its own image size; computes nothing."""
    images = jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), 3), jnp.float32)
    (features, _), variables = eval_shape_of_init(
        lambda images: model.init_with_output(jax.random.key(0), images, method=run), images
    )
    sizes = {path: leaf.size for path, leaf in traverse_util.flatten_dict(variables).items()}
    return sizes, [feature.shape for feature in features]


def assert_size(model: nn.Module, parameters: int, features: Sequence[tuple[int, ...]]) -> None:
    """Compares the number of a model's parameters and the shapes of its features."""
    sizes, shapes = traced(model)
    assert sum(size for path, size in sizes.items() if path[0] == "params") == parameters
    assert shapes == list(features)
    assert model.backbone.num_features() == len(shapes)


def rates_of(model: nn.Module, size: Sequence[int], monkeypatch: pytest.MonkeyPatch, *rooms: Any) -> list[float]:
    """The rates of a model's drop path layers, in the order of their calls; `rooms` make them, as residual.py does."""
    rates = []

    def recorded(rate: float) -> DropPath:
        rates.append(rate)
        return DropPath(rate)

    for room in (residual, *rooms):
        monkeypatch.setattr(room, "DropPath", recorded)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    return rates


def assert_rates_equal_timm(rates: Sequence[float], reference: Any) -> None:
    """Compares drop path rates with a timm model's, which has no layer where the rate is 0."""
    from timm.layers import DropPath

    wanted = [module.drop_prob for module in reference.modules() if isinstance(module, DropPath)]
    assert max(wanted) > 0
    assert [rate for rate in rates if rate] == pytest.approx(wanted)


def assert_drops_in_training_only(model: nn.Module, size: Sequence[int]) -> None:
    """Training asks for a key of random numbers, evaluation does not."""
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    jax.eval_shape(model.apply, variables, x)
    with pytest.raises(InvalidRngError):
        jax.eval_shape(lambda *args: model.apply(*args, train=True, mutable=["batch_stats"]), variables, x)


def idle_parameters(model: nn.Module, size: Sequence[int], batch: int = 2, least: float = 1e-9) -> set[str]:
    """Names of the parameters that get no gradient in a training step on random variables and images.

    Args:
      model: of any head; every output but the embedding counts.
      size: height and width of the images.
      batch: number of images.
      least: norm of a parameter's gradient, relative to that of all, below which it counts as none.
    """
    variables, x = filled(model, size), numbers(0, batch, *size, 3)

    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        outputs, _ = model.apply(variables | {"params": params}, x, train=True, rngs=rngs, mutable=["batch_stats"])
        logits = (outputs[key] for key in ("logits", "distill") if key in outputs)
        return sum(jnp.sum(value * numbers(1, *value.shape)) for value in logits)

    gradient = quick(jax.grad(loss), variables["params"])
    norms = {key: np.linalg.norm(value) for key, value in to_torch({"params": gradient}, model).items()}
    total = np.linalg.norm(list(norms.values()))
    assert np.isfinite(total)
    return {key for key, norm in norms.items() if norm < least * total}


def assert_equals_golden(model: nn.Module, golden: tuple[Any, Any, Any], *, level: int = 0) -> dict[str, Any]:
    """Compares outputs, features and names with a golden file; returns the variables.

    One of the file's two images shows as much as both. `level` is of `quick`.
    """
    weights, images, wanted = golden
    variables = from_torch(weights, model)
    features, outputs = quick(lambda v, x: model.apply(v, x, method=run), variables, images[:1], level=level)
    logits = wanted["head_logits"] if "head_logits" in wanted else wanted["logits"][None]
    assert outputs["logits"].dtype == np.float64
    assert outputs["logits"].shape == logits[:, :1].shape
    assert np.abs(outputs["logits"] - logits[:, :1]).max() < 1e-9 * logits.std()
    for i, feature in enumerate(features):
        assert error(feature.mean((1, 2)), wanted[f"feature_{i}"][:1]) < 1e-9
    return variables


def assert_same_names(
    variables: Mapping[str, Any], model: nn.Module, weights: Mapping[str, Any], *dialect: str
) -> None:
    """A model's state dict is the one that its variables were read from."""
    derived = ("num_batches_tracked", "bp_index")
    back = {key: value for key, value in to_torch(variables, model, *dialect).items() if not key.endswith(derived)}
    assert set(back) == {key for key in weights if not key.endswith(derived)}
    assert all(np.array_equal(value, np.asarray(weights[key])) for key, value in back.items())


def assert_equals_timm(
    model: nn.Module,
    reference: Any,
    x: np.ndarray,
    features: slice,
    *,
    embedding: bool = True,
    dialect: str | None = None,
    idle: Collection[str] = (),
    **intermediates: Any,
) -> None:
    """Compares a model with timm's, both with every leaf random: results, gradients, running statistics and names.

    Args:
      model: with one branch.
      reference: timm's.
      x: images.
      features: which of ours timm's `forward_intermediates` gives.
      embedding: compares that too.
      dialect: whose names timm's are, where they are not the canonical ones.
      idle: parameters that a norm cancels, so that their gradients are rounding errors.
      **intermediates: options of `forward_intermediates`.
    """
    import torch

    reference, weights = randomised(reference)
    variables = from_torch(weights, model)
    with torch.no_grad(), keeping_float64():
        last, maps = reference.forward_intermediates(nchw(x), **intermediates)
        wanted = {"logits": reference(nchw(x))[None]}
        if embedding:
            wanted["embedding"] = reference.forward_head(last, pre_logits=True)
    direction = numbers(1, *wanted["logits"].shape)

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        result, new = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"], method=run)
        return jnp.sum(result[1]["logits"] * direction), (*result, new)

    gradient, (ours, outputs, new) = quick(jax.grad(loss, has_aux=True), variables["params"], x)
    if "batch_stats" in variables:  # without them, and without dropout, training gives the same
        ours, outputs = quick(lambda v, x: model.apply(v, x, method=run), variables, x)
    assert all(error(outputs[key], value) < 1e-9 for key, value in wanted.items())
    assert max(error(a, nhwc(b)) for a, b in zip(ours[features], maps, strict=True)) < 1e-9

    with keeping_float64():
        (reference.train()(nchw(x)) * torch.from_numpy(direction[0])).sum().backward()
    gradients = {key: value.grad for key, value in reference.named_parameters()}
    mine = to_torch({"params": gradient}, model, dialect)
    assert set(mine) == set(gradients)
    largest = {key: value.abs().max().item() for key, value in gradients.items()}
    assert {key for key, value in largest.items() if value <= 1e-14 * max(largest.values())} == set(idle)
    wrong = {key for key, value in gradients.items() if error(mine[key], value) > 1e-9}
    assert wrong <= set(idle)
    state = reference.state_dict()
    statistics = {key: value for key, value in to_torch(new, model, dialect).items() if "running" in key}
    assert all(error(value, state[key]) < 1e-9 for key, value in statistics.items())
    assert_same_names(variables, model, weights, *([dialect] if dialect else []))


def initial_values(module: nn.Module, *args: Any) -> Any:
    """The variables of `module.init` for these arguments, with NumPy's random numbers.

    XLA takes ten seconds to compile the draws of a network, so every initialiser is called by itself, uncompiled.
    """
    makers: dict[tuple[str, ...], Callable[[], Any]] = {}
    rng, param, variable = np.random.default_rng(0), Scope.param, Scope.variable

    def recorded_param(scope: Scope, name: str, init: Any, *rest: Any, **options: Any) -> Any:
        keywords = {key: value for key, value in options.items() if key != "unbox"}
        makers["params", *scope.path, name] = lambda: init(None, *rest, **keywords)
        return param(scope, name, init, *rest, **options)

    def recorded_variable(scope: Scope, collection: str, name: str, init: Any, *rest: Any, **options: Any) -> Any:
        keywords = {key: value for key, value in options.items() if key != "unbox"}
        makers[collection, *scope.path, name] = lambda: init(*rest, **keywords)
        return variable(scope, collection, name, init, *rest, **options)

    def normal(key: Any, shape: Any = (), dtype: Any = float, **_: Any) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.result_type(dtype))

    def uniform(
        key: Any, shape: Any = (), dtype: Any = float, minval: Any = 0, maxval: Any = 1, **_: Any
    ) -> np.ndarray:
        return rng.uniform(minval, maxval, shape).astype(jnp.result_type(dtype))

    def truncated_normal(key: Any, lower: Any, upper: Any, shape: Any = (), dtype: Any = float, **_: Any) -> np.ndarray:
        return scipy.special.ndtri(rng.uniform(*scipy.special.ndtr([lower, upper]), shape)).astype(
            jnp.result_type(dtype)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scope, "param", recorded_param)
        patch.setattr(Scope, "variable", recorded_variable)
        shapes = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args), *args)
    assert set(makers) == set(traverse_util.flatten_dict(shapes))
    with pytest.MonkeyPatch.context() as patch:
        own = jax.nn.initializers.normal.__globals__["random"]  # where JAX's initialisers look
        for draw, library in itertools.product((normal, uniform, truncated_normal), (own, jax.random)):
            patch.setattr(library, draw.__name__, draw)
        return jax.tree.map(np.asarray, traverse_util.unflatten_dict({path: make() for path, make in makers.items()}))


def assert_initialised_like(model: nn.Module, size: Sequence[int], reference: Callable[[], Any]) -> None:
    """Compares a model's initial values with those of a torch model, see `assert_same_moments`."""
    import torch

    ours = to_torch(initial_values(model, jnp.zeros((1, *size, 3))), model)
    torch.manual_seed(0)
    assert_same_moments(ours, reference().state_dict())


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Normally distributed numbers, in float64."""
    return np.random.default_rng(seed).standard_normal(shape)


def filled(model: nn.Module, size: Sequence[int]) -> dict[str, Any]:
    """Random variables of a model by the rule of the golden files, in float64."""
    shapes = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
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
