"""The README and the documents: every code block runs as it is pasted, every link leads somewhere.

The README's blocks run in order, in one folder with the configs. What differs from a newcomer's, to save time:

- the environment is there already, so the commands of `SETUP` are left out;
- `make demo` is replaced by the commands of its recipe in the Makefile;
- `SHORT` is appended to every command that trains or evaluates a config, which trains for two steps then;
- `benchmark` measures for a moment, not for ten seconds;
- commands run in this process (test_main.py starts main.py in another);
- one block of ConvNeXt stands for the demo's MaxViT (`small_demo` in conftest.py).

A comment `<!-- needs: WHAT -->` above a block says what the block needs and the tests do not have: it is not run.
"""

import pkgutil
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from maxmap.__main__ import main
from tests.tiny import ROOT, write_folder

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
SETUP = ("make setup", "make test", "make docs", "source ", "pip install ")
SHORT = "--config.steps=2 --config.batch_size=8 --config.checkpoint.every=1 --config.mesh.data=1"
MOST_SKIPPED = 2
MOST_WORDS = 1000

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
MAIN = re.compile(r"^python (?:main\.py|-m maxmap train)(?:\\\n|[^\n#\\])*", re.MULTILINE)
BENCHMARK = re.compile(r"^python -m maxmap benchmark [^\n#]*", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: what it needs and the tests lack, its language ("" for a picture or an output) and its text."""

    needs: str | None
    language: str
    text: str


BLOCKS = [Block(*match.group("needs", "language", "text")) for match in BLOCK.finditer(README.read_text("utf-8"))]


def code(path: Path) -> list[str]:
    """Fenced blocks and inline code of a Markdown file."""
    text = path.read_text("utf-8")
    return FENCED.findall(text) + re.findall(r"`[^`\n]+`", FENCED.sub("", text))


def demo() -> str:
    """The commands of `make demo`."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    variables = dict(re.findall(r"^(\w+) :?= (.*)$", makefile, re.MULTILINE))
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    return recipe.replace("\t", "").replace("$(BIN)/", "").replace("$(DEMO)", variables["DEMO"])


def commands(text: str) -> list[str]:
    """The commands of a shell block as the test runs them; see the top of the file."""
    lines = [line for line in text.splitlines() if not line.startswith(SETUP)]
    text = "\n".join(demo() if line.startswith("make demo") else line for line in lines)
    text = MAIN.sub(lambda command: f"{command[0].rstrip()} {SHORT} ", text)
    text = BENCHMARK.sub(lambda command: f"{command[0].rstrip()} --seconds=0.01 ", text)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def run(command: str) -> None:
    """Runs `python -m maxmap ...` or `python main.py ...`, whose arguments a shell reads and expands."""
    read = ["bash", "-ec", f"""python() {{ printf '%s\\0' "$@"; }}; {command}"""]
    arguments = subprocess.run(read, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    assert arguments[:1] == ["main.py"] or arguments[:2] == ["-m", "maxmap"], command
    argv = ["train", *arguments[1:]] if arguments[0] == "main.py" else arguments[2:]
    assert main(argv) == 0, command


def test_every_block_of_the_readme_runs(tmp_path, monkeypatch, small_demo, quick_compilation):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in BLOCKS:
        if block.needs or not block.language:
            continue
        if block.language == "python":
            exec(compile(block.text, "README.md", "exec"), session)
            continue
        for command in commands(block.text):
            run(command)


def test_few_blocks_are_not_run():
    assert {block.language for block in BLOCKS} <= {"", "sh", "python"}, "no test runs a block of another language"
    skipped = [block for block in BLOCKS if block.needs]
    assert len(skipped) == README.read_text("utf-8").count("<!-- needs") <= MOST_SKIPPED
    assert all(block.language for block in skipped)


def test_the_readme_is_short():
    prose = re.sub(r"<!--.*?-->", "", FENCED.sub("", README.read_text("utf-8")))
    assert len(prose.split()) <= MOST_WORDS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", path.read_text("utf-8")))
    files = [target.partition("#")[0] for target in targets if not target.startswith(("https://", "#"))]
    assert not [file for file in files if not (path.parent / file).is_file()]


def test_every_document_is_linked_from_the_readme():
    text = README.read_text("utf-8")
    assert not [path.name for path in ROOT.glob("docs/*.md") if f"(docs/{path.name})" not in text]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_the_documents_exist(path):
    """Files and folders of the repository; modules, functions and classes of the package. Capitals stand for a name."""
    text = path.read_text("utf-8")
    files = re.findall(r"(?<![\w/.])(?:tests|benchmarks|configs|maxmap)/[a-z\d_/]+(?:\.py\b|\.csv\b|/(?=[\s`]))", text)
    assert not [file for file in files if not (ROOT / file).exists()]
    for name in re.findall(r"`(maxmap(?:\.\w+)+)[(`]", text):
        pkgutil.resolve_name(name)


def test_commands_of_the_documents_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+)(?:  |$)", capsys.readouterr().out, re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        text = "\n".join(code(path))
        named = set(re.findall(r"python -m maxmap ([a-z-]+)", text))
        assert named <= commands, f"{path.name} names the commands {named - commands}"
        promised = set(re.findall(r"\bmake ([a-z]+)\b", text))
        assert promised <= targets, f"{path.name} promises make {promised - targets}"
        if path == README:
            assert named == commands, f"README.md does not name {commands - named}"
            assert {"demo", "test"} <= promised
