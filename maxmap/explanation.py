"""What a prediction rests on: each branch's and token's share of the logit, where it looked, and Grad-CAM."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from maxmap import storage, tasks
from maxmap.data.augment import normalize
from maxmap.data.preprocessing import cropped
from maxmap.errors import UserError, nearest, printable, reason
from maxmap.features import intermediates
from maxmap.inference import load_classifier
from maxmap.models import Classifier, average, block_paths
from maxmap.operations import Array, kernels
from maxmap.pictures import draw_grid, overlay, save_picture, shown


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the logits of B images rest on, one class for each image.

    The logit of a class is the mean over the branches. A branch's classifier is linear in its tokens behind their norm,
    so the logit is a sum: `shares` over branches and tokens, and `bias`.

    Attributes:
      classes: `[B]`.
      logits: of these classes, `[B]`.
      probabilities: of these classes among all, `[B]`.
      shares: what each token of each branch adds, `[B, G, T]`; None for a linear head.
      bias: what the biases of the classifiers add, `[B]`; None for a linear head.
      attention: how much each token attended to each place of the map, `[B, G, T, h, w]`: the mean over the heads of
        its last attention. None for a linear head.
      saliency: Grad-CAM of the class (Selvaraju et al. 2017), `[B, h, w]`, on the last feature map; where the head
        reads a class token, on the pixels' tokens in front of the last attention.
    """

    classes: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    shares: np.ndarray | None
    bias: np.ndarray | None
    attention: np.ndarray | None
    saliency: np.ndarray


def explain(
    model: Classifier, variables: Mapping[str, Any], images: Array, classes: Sequence[int] | None = None
) -> Explanation:
    """Explains a model's logits.

    Args:
      model: of `create_model` or `load`, with a classifier.
      variables: of the model.
      images: float `[B, H, W, C]`, normalised.
      classes: one for each image; None for the likeliest.
    """
    chosen = None if classes is None else jnp.asarray(classes)
    return Explanation(**jax.tree.map(np.asarray, _explain(model, variables, images, chosen)))


@functools.partial(jax.jit, static_argnums=0)
def _explain(model: Classifier, variables: Mapping[str, Any], images: Array, classes: Array | None) -> dict[str, Any]:
    """Returns the fields of an `Explanation`."""
    features = model.apply(variables, images, method="features")
    of_head = {collection: tree["head"] for collection, tree in variables.items() if "head" in tree}
    outputs, sown = model.head.apply(of_head, features, mutable=["intermediates"])
    logits = average(outputs)
    classes = jnp.argmax(logits, axis=-1) if classes is None else classes
    found: dict[str, Any] = {
        "classes": classes,
        "logits": logits[jnp.arange(len(classes)), classes],
        "probabilities": nn.softmax(logits)[jnp.arange(len(classes)), classes],
        **dict.fromkeys(("shares", "bias", "attention")),
    }
    if hasattr(model.head, "shares"):
        added, biases = model.head.shares(of_head["params"], outputs, classes)
        branches = len(added)
        found["shares"] = jnp.moveaxis(added, 0, 1) / branches
        found["bias"] = jnp.sum(biases, axis=0) / branches
        attention = jnp.moveaxis(model.head.attention_of(sown["intermediates"]), 0, 1)
        found["attention"] = attention.reshape(*attention.shape[:3], *model.head.attended_size(features))
    if getattr(model.backbone, "class_token", False):  # which is the last map, of one pixel
        found["saliency"] = _of_tokens(model, variables, images, classes, features[-2].shape[1:3])
    else:
        found["saliency"] = _of_map(model, of_head, features, classes)
    return found


def _of_map(model: Classifier, of_head: Mapping[str, Any], features: Sequence[Array], classes: Array) -> Array:
    """Grad-CAM on the last feature map: `[B, h, w]`."""

    def total(last: Array) -> Array:
        logits = average(model.head.apply(of_head, [*features[:-1], last]))
        return jnp.sum(logits[jnp.arange(len(classes)), classes])

    return _weighted(jax.grad(total)(features[-1]), features[-1])


def _of_tokens(
    model: Classifier, variables: Mapping[str, Any], images: Array, classes: Array, size: Sequence[int]
) -> Array:
    """Grad-CAM on the pixels' tokens in front of the last attention, behind their norm: `[B, h, w]`."""
    path = next(path for path in block_paths(model)[-1] if path.endswith("norm1"))

    def total(change: Array) -> Array:
        def add(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            result = call(*args, **kwargs)
            here = context.method_name == "__call__" and "/".join(context.module.path) == path
            return result + change if here else result

        with nn.intercept_methods(add), kernels("plain"):  # a kernel does not call the modules that it computes
            logits = average(model.clone(remat=False).apply(variables, images))
        return jnp.sum(logits[jnp.arange(len(classes)), classes])

    tokens = intermediates(model, variables, images, [path])[path]
    gradient = jax.grad(total)(jnp.zeros_like(tokens))
    first = tokens.shape[1] - size[0] * size[1]
    gradient, tokens = (x[:, first:].reshape(len(x), *size, -1) for x in (gradient, tokens))
    return _weighted(gradient, tokens)


def _weighted(gradient: Array, x: Array) -> Array:
    """Sums the channels of a map by their mean gradients, and keeps what is positive."""
    weights = jnp.mean(gradient, axis=(1, 2), keepdims=True)
    return nn.relu(jnp.sum(weights * x, axis=-1))


def explain_files(
    path: str | Path, images: Sequence[str | Path], out: str | Path, *, class_name: str | None = None
) -> list[dict[str, Any]]:
    """Explains a checkpoint's predictions on image files by pictures and numbers.

    Args:
      path: of the checkpoint, as for `maxmap.load`.
      images: paths of image files.
      out: folder for a picture of each image and for `explain.json`, which holds what is returned.
      class_name: the class to explain; None for the likeliest of each image.

    Returns:
      For each image 'image', 'picture', 'class', 'probability', 'logit' and, with branches of tokens, 'bias' and
      'shares', a list of tokens for each branch. Bias and shares add up to the logit.

    Raises:
      UserError: there is no checkpoint, no such class, a file is no image, or `out` cannot be written.
    """
    model, variables, info = load_classifier(path)
    names, pre = info["classes"], info["preprocessing"]
    tasks.require_classes(info, "explain", path)
    if class_name is not None and class_name not in names:
        raise UserError(f"the checkpoint has no class '{class_name}'; the nearest are {nearest(class_name, names)}.")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {printable(out)} ({reason(error)}): give another --out.") from error
    rows = []
    for number, image in enumerate(images):
        seen = cropped(image, pre)
        batch = normalize(jnp.asarray(seen)[None], pre["mean"], pre["std"])
        chosen = None if class_name is None else [names.index(class_name)]
        found = explain(model, variables, batch, chosen)
        label = int(found.classes[0])
        row: dict[str, Any] = {
            "image": printable(image),
            "picture": f"{number:05}_{Path(image).stem}.png",
            "class": names[label],
            "probability": float(found.probabilities[0]),
            "logit": float(found.logits[0]),
        }
        if found.shares is not None and found.bias is not None:
            row |= {"bias": float(found.bias[0]), "shares": found.shares[0].tolist()}
        rows.append(row)
        save_picture(draw(seen, found), Path(out) / row["picture"])
    storage.write_named(Path(out) / "explain.json", json.dumps(rows, indent=2) + "\n")
    return rows


def draw(seen: np.ndarray, found: Explanation) -> Image.Image:
    """Draws the explanation of one image: what the model saw, Grad-CAM, and each token's attention with its share.

    Args:
      seen: the image as it is cropped, uint8 `[H, W, C]`.
      found: of this image alone.
    """
    cells, captions = [shown(seen), overlay(seen, found.saliency[0])], ["what the model saw", "Grad-CAM"]
    if found.attention is not None and found.shares is not None:
        for g, t in np.ndindex(found.shares.shape[1:]):
            cells.append(overlay(seen, found.attention[0, g, t]))
            token = f", token {t}" if found.shares.shape[2] > 1 else ""
            captions.append(f"branch {g}{token}\n{found.shares[0, g, t]:+.2f} of {found.logits[0]:.2f}")
    return draw_grid(np.stack(cells), captions)
