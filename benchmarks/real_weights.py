"""Released MobileNetV1 weights, converted, on real photographs: their accuracy beside that of an independent reference.

    python -m benchmarks.real_weights shared/data     the table of docs/conversion.md

The folder has `mobilenet_v1` (the files of weights, `reference_logits.npz`, `reference_top.json`) and
`imagenet_sample.tar` (one photograph of each class of ImageNet). Each file is converted as by `maxmap convert`, and
classifies all photographs with the preprocessing that the checkpoint then carries. Columns: top-1 and top-5 in per
cent, the reference's, and the largest difference of a logit from the reference's, relative to their standard deviation,
over the photographs of which it has logits.
"""

import argparse
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import maxmap
from maxmap.convert.load import convert


@dataclass(frozen=True)
class Case:
    """A file of weights.

    Attributes:
      source: in the folder of weights.
      options: of `convert`, paths in the same folder.
      top: the reference's top-1 and top-5, as far as they are known.
      reference: key of its logits and exact accuracies; empty for none.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    top: Sequence[float] = ()
    reference: str = ""


# The accuracies are those in the README of the data, but for the two that `reference_top.json` has.
CASES = (
    Case("keras_0.25_224", reference="keras_0.25_224"),
    Case("mobilenet_v1_0.25_224_1_default_1.tflite", top=(57.2,)),
    Case("mobilenet_v1_0.25_128_quant.tflite", top=(45.0,)),
    Case("mobilenet_v1_0.25_224_quant.tflite", top=(55.7,)),
    Case("mobilenet_v1_0.5_160_quant.tflite", top=(68.8,)),
    Case("mobilenet_v1_0.75_192_quant.tflite", top=(81.1,)),
    Case(
        "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite",
        {"classifier": "mobilenet_quant_v1_224_head_layers.tflite"},
        reference="tflite_1.0_224_dequantised",
    ),
    Case(
        "tflite_1.0_224_dequantised.safetensors",
        {"name": "mobilenet_v1_100_tf"},
        reference="tflite_1.0_224_dequantised",
    ),
    Case("mobilenetV1X0.25_pretrain.tar", {"name": "mobilenet_v1_025_leaky"}, top=(52.0,)),
)


def convert_case(case: Case, weights: Path, dest: Path) -> None:
    """Converts a file into the folder `dest`."""
    options = {key: weights / value if key == "classifier" else value for key, value in case.options.items()}
    convert(weights / case.source, dest, **options)


def logits_of(checkpoint: Path, photographs: Sequence[Path], batch_size: int = 50) -> np.ndarray:
    """Returns the logits `[N, K]` of photographs, with the preprocessing of the checkpoint."""
    model, variables, info = maxmap.load(checkpoint)

    @jax.jit
    def run(variables: Any, images: jax.Array) -> jax.Array:
        return maxmap.average(model.apply(variables, images))

    logits = []
    with ThreadPoolExecutor() as pool, jax.default_matmul_precision("highest"):
        for start in range(0, len(photographs), batch_size):
            batch = pool.map(lambda path: maxmap.preprocess(path, info), photographs[start : start + batch_size])
            logits.append(np.asarray(run(variables, np.concatenate(list(batch)))))
    return np.concatenate(logits)


def top(logits: np.ndarray, k: int) -> float:
    """Returns the top-k accuracy in per cent of photographs of which number i is of class i."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float(100 * np.mean((best == np.arange(len(logits))[:, None]).any(axis=1)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with mobilenet_v1 and imagenet_sample.tar")
    data = parser.parse_args().data
    logging.set_verbosity(logging.ERROR)  # orbax logs every file that it writes
    weights = data / "mobilenet_v1"
    exact = json.loads((weights / "reference_top.json").read_text())
    print("| file | model | pixels | top-1 / top-5 | reference | largest difference of a logit |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch, np.load(weights / "reference_logits.npz") as reference:
        with tarfile.open(data / "imagenet_sample.tar") as archive:
            archive.extractall(scratch, filter="data")
        photographs = sorted(Path(scratch).glob("imagenet_sample/val/*/*"))
        for number, case in enumerate(CASES):
            dest = Path(scratch, str(number))
            convert_case(case, weights, dest)
            logits = logits_of(dest, photographs)
            info = maxmap.load(dest)[2]
            wanted = case.top or tuple(exact[case.reference].values())
            difference = ""
            if case.reference:
                theirs = reference[case.reference]
                difference = f"{np.abs(logits[: len(theirs)] - theirs).max() / theirs.std():.0e} of their std"
            files = " + ".join([case.source, *(v for k, v in case.options.items() if k == "classifier")])
            print(
                f"| `{files}` | `{info['model']['name']}` | {info['preprocessing']['image_size']} "
                f"| {top(logits, 1):.1f} / {top(logits, 5):.1f} | {' / '.join(map(str, wanted))} | {difference} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
