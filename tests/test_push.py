"""A checkpoint on the Hugging Face hub: what `push` writes is what "hub:OWNER/NAME" loads, by a local server."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants

import maxmap
from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.test_commands import mistake
from tests.test_grid import BACKBONES
from tests.tiny import CLASSES, assert_equal, preprocessing

TOKEN = "hf_secret"
MODEL = {"name": "mobilenet_v1", **BACKBONES["mobilenet"][1], "head": {"name": "linear"}, "num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with fields of its own, averaged weights and figures."""
    model = create_model(**MODEL)
    shapes = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), dict(shapes))
    info = {"model": MODEL, "classes": list(CLASSES), "step": 7, "weights": "ema"}
    info["preprocessing"] = preprocessing() | {"image_size": 16, "exif": True}
    folder = tmp_path_factory.mktemp("push") / "run"
    checkpoint.write_variables(folder, variables, info)
    figures = {"step": 7, "weights": "ema", "top1": 81.25, "top5": 99.5, "images": 1600}
    (folder / "eval.json").write_text(json.dumps(figures))
    return folder


class Hub(BaseHTTPRequestHandler):
    """As the hub answers who writes and reads a repository of small files; `server.status` refuses writers."""

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, **content) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.status:
            self.answer(self.server.status, b'{"error": "no"}', Content_Type="application/json")
        elif self.path == "/api/repos/create":
            self.say(url="https://huggingface.co/me/net")
        elif self.path == "/api/validate-yaml":
            self.say(errors=[], warnings=[])
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.say(files=[{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths])
        else:
            assert re.fullmatch(r"/api/models/me/net/commit/main", self.path)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.say(commitUrl="https://huggingface.co/me/net/commit/1", commitOid="1" * 40)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/me/net"):
            self.say(id="me/net", sha="1" * 40, siblings=[])
        elif (file := self.path.removeprefix("/me/net/resolve/main/")) in self.server.files:
            content = self.server.files[file]
            state = hashlib.sha1(b"".join(self.server.files.values())).hexdigest()
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=state)
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.asked, server.status = {}, [], 0
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        for name in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):  # the library reads the variable when it is imported
            monkeypatch.setattr(constants, name, getattr(constants, name).replace(constants.ENDPOINT, address))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server
        server.shutdown()


def test_what_is_pushed_is_what_is_loaded(folder, server, tmp_path, capfd):
    assert main(["push", str(folder), "me/net", "--private"]) == 0
    told = capfd.readouterr()
    assert told.out == "me/net: mobilenet_v1, ema weights of step 7; load it as hub:me/net\n" and told.err == ""
    assert set(server.files) == {"model.safetensors", "config.json", "README.md"}
    assert {key for _, key in server.asked} == {f"Bearer {TOKEN}"}
    assert not [name for name, content in server.files.items() if TOKEN.encode() in content]
    card = server.files["README.md"].decode()
    assert "| 81.25 % | 99.50 % | 1,600 |" in card and 'maxmap.load("hub:me/net")' in card
    # The whole model, with its fields and its preprocessing; and as a checkpoint of ours, by the command.
    model, variables, info = maxmap.load("hub:me/net")
    wanted, own, stored = maxmap.load(folder)
    assert model == wanted
    assert_equal(variables, own)
    assert all(info[key] == stored[key] for key in ("classes", "preprocessing", "weights"))
    assert main(["convert", "hub:me/net", str(tmp_path / "converted")]) == 0
    assert_equal(maxmap.load(tmp_path / "converted")[1], own)


def test_the_card_has_no_figures_of_other_weights(folder, server):
    figures = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").write_text(json.dumps(figures | {"step": 6}))
    assert main(["push", str(folder), "me/net"]) == 0
    assert "81.25" not in server.files["README.md"].decode()


def test_mistakes_are_one_sentence(folder, server, capsys, monkeypatch):
    def says(name="me/net"):
        told = mistake(capsys, "push", folder, name)
        assert TOKEN not in told and not server.files
        return told

    assert "'net' is no name of a repository: give OWNER/NAME" in says("net")
    for status, sentence in {401: "set HF_TOKEN to a token that may write there", 400: "(status 400)"}.items():
        server.status = status
        assert sentence in says()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "me/net cannot be written (ConnectError" in says()


def test_a_spoiled_config_is_one_sentence(folder, server, capsys):
    assert main(["push", str(folder), "me/net"]) == 0
    capsys.readouterr()
    config = json.loads(server.files["config.json"])
    deep = config["maxmap"] | {"model": MODEL | {"depths": [9, 9**9]}}
    for own, sentence in (
        (3, "does not describe a model"),
        ({"model": {"name": 3}, "weights": "raw"}, "does not describe a model"),
        ({"model": {"name": "pit_s"}}, "does not describe a model"),
        (deep, "names more blocks than the weights have"),
    ):
        server.files["config.json"] = json.dumps(config | {"maxmap": own}).encode()
        assert sentence in mistake(capsys, "convert", "hub:me/net", folder.parent / "a")
