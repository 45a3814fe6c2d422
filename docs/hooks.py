"""What the site needs beside mkdocs.yml: where its files lie, notebooks as pages, and Flax modules as dataclasses."""

import json
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")  # beside the files of docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Lays the site's files out as they lie in the repository, so that every link between them holds there too."""
    documents = [file for file in files if file.src_dir == config.docs_dir]
    for file in documents:
        files.remove(file)
    for path in (*PAGES, *(f"docs/{file.src_uri}" for file in documents)):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for notebook in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=_as_markdown(notebook)))
        files.append(File(f"notebooks/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Has a link to a notebook lead to its page."""
    return re.sub(r"(\]\((?:\.\./)*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)


def _as_markdown(notebook: Path) -> str:
    """Returns the cells of a notebook as a document that links to the notebook itself."""
    parts = []
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([parts[0], f"[Download this notebook]({notebook.name}).", *parts[1:]])


class FlaxModules(griffe.Extension):
    """Shows the fields of a Flax module with their defaults: it is a dataclass, though no decorator says so."""

    def on_class_instance(self, *, cls: griffe.Class, **_: object) -> None:
        """Adds the decorator."""
        if {"flax.linen.Module", "maxmap.layers.primitives.Block"} & {base.canonical_path for base in cls.bases}:
            cls.decorators.append(
                griffe.Decorator(griffe.ExprName("dataclasses.dataclass"), lineno=None, endlineno=None)
            )
