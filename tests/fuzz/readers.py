"""All rows of the table, and the modules that read only files of this machine or of maxmap itself."""

from tests.fuzz import (
    archive_rows,
    band_rows,
    hub_rows,
    mask_rows,
    picture_rows,
    program_rows,
    tensorflow_rows,
    text_rows,
    torch_rows,
)
from tests.fuzz.rows import Row

ROWS: tuple[Row, ...] = (
    *hub_rows.ROWS,
    *torch_rows.ROWS,
    *tensorflow_rows.ROWS,
    *program_rows.ROWS,
    *archive_rows.ROWS,
    *picture_rows.ROWS,
    *band_rows.ROWS,
    *mask_rows.ROWS,
    *text_rows.ROWS,
)

OWN_FILES = {
    "maxmap.push": "the eval.json of a run of its own",
    "maxmap.model_commands": "a table of the package",
    "maxmap.accelerators.bundles": "what a compiler on this machine writes",
    "maxmap.accelerators.program": "source files of the package",
    "maxmap.bulk": "images and archives are read by the readers of rows",
    "maxmap.checkpoint": "checkpoints that maxmap wrote, by orbax; SECURITY.md says what is not promised for them",
    "maxmap.onnx.proto": "it writes",
    "maxmap.onnx.session": "files that maxmap exported, by onnxruntime; SECURITY.md says what is not promised for them",
    "maxmap.recipe_files": "recipes of the package",
    "maxmap.report.evidence": "what maxmap wrote into the folder of a checkpoint",
    "maxmap.result_table": "its own unfinished table",
    "maxmap.runtime": "what the operating system says of memory",
    "maxmap.storage": "files that maxmap wrote, for their checksums",
    "maxmap.train.board": "it writes",
    "maxmap.train.build": "its own config, once more",
    "maxmap.train.resume": "the lock and the config of a run of its own",
    "maxmap.train.watch": "events of a run of its own",
    "maxmap.wordnet": "a table of the package",
}
