"""The command train, and main.py, which is the same: what it prints and its exit code.

What else can be wrong with the input is in test_loop.py.
"""

import json
import os
import subprocess
import sys

import pytest

from maxmap import training_commands
from maxmap.__main__ import main
from maxmap.errors import UserError
from tests.tiny import ROOT

QUICKSTART = str(ROOT / "configs/quickstart.py")


def start(*argv: str, cwd=ROOT) -> subprocess.CompletedProcess:
    """Runs main.py; compiled programs go where the other tests keep theirs."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )


def one_sentence(text: str) -> str:
    assert text.startswith("maxmap: ") and text.count("\n") == 1 and "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The quickstart with a network that compiles soon."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(
        "import runpy\n"
        f"def get_config():\n    config = runpy.run_path({QUICKSTART!r})['get_config']()\n"
        "    config.model = {'name': 'maxvit_mini_32', 'window_size': 2, 'stem_width': (8, 8), 'embed_dim': (8,),\n"
        "        'depths': (1,), 'block_types': ('M',), 'strides': (2,), 'transformer': {'head_dim': 8}}\n"
        "    config.data.image_size = 8\n"
        "    return config\n"
    )
    return str(path)


@pytest.mark.long  # test_readme.py does this in one process
def test_train_then_evaluate(small, tmp_path, capsys, quick_compilation):
    flags = (f"--config={small}", "--config.steps=2", "--config.batch_size=16", "--config.mesh.data=1")
    trained = start(*flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert result["step"] == 2 and result["images"] == 360 and result["model"] == "maxvit_mini_32"
    # The folder of the run is named after the config.
    assert json.loads((tmp_path / "runs/small/eval.json").read_text()) == result
    assert "step 2/2" in trained.stderr and "top-1" in trained.stderr

    assert main(["train", *flags, "--mode=eval", f"--workdir={tmp_path}/runs/small"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("raw")["top1"] >= 0 and again == result


def test_the_flagship_without_imagenet(tmp_path):
    ended = start(f"--config={ROOT}/configs/maxvit_tiny_map.py", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    sentence = one_sentence(ended.stderr)
    for part in ("data/imagenet", "--config.data.path", "--config.data.source=tfds", "make demo"):
        assert part in sentence
    assert list(tmp_path.iterdir()) == []


def test_help():
    helped = start("--help")
    assert "Traceback" not in helped.stderr
    assert "--workdir" in helped.stdout and "--mode" in helped.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "the following arguments are required: --config"),
        (
            ("--config=configs/quickstrat.py",),
            "no config file configs/quickstrat.py, nor a recipe of this name; the nea",
        ),
        (
            ("--config=quickstrat",),
            "no config file quickstrat, nor a recipe of this name; the nearest recipes are quicks",
        ),
        ((f"--config={QUICKSTART}", "--config.epoch=3"), "the config has no key 'epoch'"),
        ((f"--config={QUICKSTART}", "--config.optim.lr=3"), "config.optim has no key 'lr'"),
        ((f"--config={QUICKSTART}", "--config.optim.name.lr=3"), "config.optim.name has no key 'lr'"),
        ((f"--config={QUICKSTART}:twin",), "get_config"),
        ((f"--config={ROOT}/configs/cifar10.py:linaer",), "linaer"),
        ((f"--config={QUICKSTART}", "--wrokdir=x"), "wrokdir"),
        ((f"--config={QUICKSTART}", "--mode=trian"), "trian"),
        ((f"--config={QUICKSTART}", "run"), "unrecognized arguments: run"),
    ],
    ids=["none", "config", "recipe", "key", "section", "leaf", "argument", "twin", "flag", "mode", "positional"],
)
def test_wrong_flags(argv, says, capsys):
    try:
        code = main(["train", *argv])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert says in one_sentence(captured.err)


def test_a_value_of_the_wrong_type():
    stopped = start(f"--config={QUICKSTART}", "--config.batch_size=many")
    assert stopped.returncode == 2 and "many" in one_sentence(stopped.stderr)


def test_help_config(capsys):
    assert main(["train", "--config=quickstart", "--help_config", "--config.epochs=7"]) == 0
    printed = capsys.readouterr().out
    assert "config.epochs = 7  (int of at least 1; required)\n    Epochs to train for" in printed
    assert "config.data.draft = True  (bool; default True)\n" in printed


def test_a_users_mistake_is_printed_and_a_bug_is_not_hidden(capsys, monkeypatch, tmp_path):
    def fail(recipe, workdir, *, allow_changes):
        assert not allow_changes and recipe.epochs == 25 and workdir == str(tmp_path)
        raise errors.pop()

    errors = [ValueError("a bug"), UserError("give\n   another one.")]
    monkeypatch.setattr(training_commands.loop, "run", fail)
    argv = ["train", f"--config={QUICKSTART}", f"--workdir={tmp_path}"]
    assert main(argv) == 2
    assert capsys.readouterr().err == "maxmap: give another one.\n"
    with pytest.raises(ValueError, match="a bug"):
        main(argv)
