"""A checkpoint as a repository on the Hugging Face hub: weights, settings and a card, in one commit."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from maxmap import storage
from maxmap.convert.hub import one_line, quiet
from maxmap.convert.load import export, read_weights
from maxmap.cost import count_parameters
from maxmap.data.preprocessing import in_words
from maxmap.errors import UserError, printable
from maxmap.evaluate import COUNTED
from maxmap.tasks import require_classes

_FIGURES = ("top1", "top5", "images")  # of an eval.json, which the card names


def push(source: str | Path, repository: str, *, ema: bool | None = None, private: bool = False) -> str:
    """Writes a checkpoint into a repository on the Hugging Face hub, from which "hub:OWNER/NAME" is loaded.

    The repository gets `model.safetensors` with the canonical names, `config.json` with the model, the classes and the
    preprocessing (also in timm's words), and `README.md`, a card with the figures of the checkpoint's `eval.json` if
    that is of the same step and weights. It is made if it is not there. The usual variables name the hub and the token:
    HF_ENDPOINT, HF_TOKEN, HF_HOME.

    Args:
      source: folder of a run or of a converted checkpoint.
      repository: "OWNER/NAME".
      ema: True for the averaged weights, False for the raw ones; None for the averaged ones if there are any.
      private: a new repository is shown to its owner alone.

    Returns:
      A line of text that says what was written where.

    Raises:
      UserError: there is no checkpoint, it has another task than one class per image, the name is none, or the hub does
        not take it.
    """
    repository = repository.removeprefix("hub:")
    try:
        validate_repo_id(repository)
        named = "/" in repository
    except HFValidationError:
        named = False
    if not named:
        raise UserError(f"'{printable(repository)}' is no name of a repository: give OWNER/NAME.")
    variables, info = read_weights(source, ema)
    require_classes(info, "push", source)
    with tempfile.TemporaryDirectory() as folder:
        export(source, Path(folder) / "model.safetensors", ema=ema)
        files = {
            "config.json": json.dumps(_config(info), indent=2),
            "README.md": _card(source, repository, variables, info),
        }
        for file, text in files.items():
            Path(folder, file).write_text(text + "\n", "utf-8")
        del variables
        hub = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        try:
            with quiet():
                hub.create_repo(repository, exist_ok=True, private=private or None)
                message = f"step {info['step']}, by maxmap"
                hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except HfHubHTTPError as error:
            raise UserError(_refusal(repository, error)) from None
        except Exception as error:  # the hub's library lets errors of its network libraries through
            raise UserError(f"{repository} cannot be written ({one_line(error)}): try again.") from None
    what = f"{info['model']['name']}, {info['weights']} weights of step {info['step']}"
    return f"{repository}: {what}; load it as hub:{repository}"


def _refusal(repository: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"the hub does not let you write {repository} (status {status}): set HF_TOKEN to a token that may write "
            "there, or give a repository of your own."
        )
    return f"the hub does not take {repository} (status {status}): look at its name, or try again."


def _config(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json: what `maxmap.convert.load` reads, and the same in timm's words for other readers."""
    pre = info["preprocessing"]
    side = pre["image_size"]
    return {
        "library_name": "maxmap",
        "architecture": info["model"]["name"],
        "num_classes": len(info["classes"]),
        "label_names": info["classes"],
        "pretrained_cfg": {"input_size": [len(pre["mean"]), side, side]}
        | {key: value for key, value in pre.items() if key != "image_size"},
        "maxmap": {"model": info["model"], "weights": info["weights"], "step": info["step"]},
    }


def _card(source: str | Path, repository: str, variables: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """Returns the repository's README.md."""
    found = _figures(source, info)
    figures = "There are no figures for these weights.\n"
    if found:
        figures = (
            "| top-1 | top-5 | images |\n|---|---|---|\n"
            f"| {found['top1']:.2f} % | {found['top5']:.2f} % | {found['images']:,} |\n\n"
            "Measured by maxmap on the images that the checkpoint was evaluated on.\n"
        )
    return f"""---
library_name: maxmap
pipeline_tag: image-classification
tags:
- image-classification
- jax
---

# {repository}

`{info["model"]["name"]}`, {count_parameters(variables["params"]):,} parameters, {len(info["classes"]):,} classes: \
{info["weights"]} weights of step {info["step"]}.

{figures}
Preprocessing: {in_words(info["preprocessing"])}.

```python
import maxmap

model, variables, info = maxmap.load("hub:{repository}")
logits = maxmap.average(model.apply(variables, maxmap.preprocess("photo.jpg", info)))
```
"""


def _figures(source: str | Path, info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the content of the checkpoint's eval.json, None if there is none for these weights and preprocessing."""
    file = storage.resolve(source) / "eval.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file} is damaged: evaluate the checkpoint again, or remove it.") from None
    wanted = {"step": info["step"], "weights": info["weights"]}
    seen = {key: found.get(key, value) for key, value in info["preprocessing"].items()}  # by the images
    same = all(found.get(key) == value for key, value in wanted.items()) and seen == info["preprocessing"]
    return found if same and found.keys().isdisjoint(COUNTED) and all(key in found for key in _FIGURES) else None
