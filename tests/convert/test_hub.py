"""Published names: their table, the hub, and its cache."""

import contextlib
import json
import re
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import maxmap
from maxmap.convert import hub
from maxmap.convert.load import read_foreign
from maxmap.convert.torch import abstract_variables, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.reference import fill

NAME = "test_maxvit"  # of timm, 160 pixels


@pytest.fixture(scope="module")
def state_dict():
    """A small model, every entry random."""
    model = create_model(NAME)
    return {key: fill(key, value.shape) for key, value in to_torch(zeros(abstract_variables(model)), model).items()}


def zeros(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.fixture(scope="module")
def source(state_dict, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(state_dict, path)
    return path


# Backbones whose parameters are the same for every image size.
FOR_EVERY_SIZE = (
    "ConvNeXt",
    "EfficientViT",
    "EfficientViTLarge",
    "FastViT",
    "FastViTSA",
    "MobileNetV1",
    "MobileViT",
    "MobileViTV2",
    "ResNet",
)


def test_every_published_checkpoint_is_of_a_model_of_its_name_and_size():
    rows, known = hub.published(), set(maxmap.list_models())
    assert len(rows) > 200
    for name, row in rows.items():
        assert row["model"] in known, name
        if name.startswith("timm/"):
            # MetaFormer's 384 pixels are in timm's tag and in our name; ConvNeXt's are in the tag alone.
            base = name.removeprefix("timm/").partition(".")[0]
            sized = f"{base}_384"
            assert row["model"] == (sized if name.endswith("_384") and sized in known else base), name
        backbone = create_model(row["model"]).backbone
        if type(backbone).__name__ not in FOR_EVERY_SIZE:
            assert row["preprocessing"]["image_size"] == backbone.image_size, name


CONFIG = {
    "architecture": NAME,
    "num_classes": 1000,
    "pretrained_cfg": {
        "input_size": [3, 160, 160],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
}


@pytest.fixture
def server(source, monkeypatch, tmp_path):
    """A server of one repository, as the hub answers for the files of a model."""
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": source.read_bytes()}
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            asked.append((self.command, self.path))
            *_, repository, _, _, file = ["", *self.path.strip("/").split("/")]
            if repository != "maxvit_small" or file not in files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if repository == "maxvit_small" else "RepoNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[file])))
            self.send_header("ETag", f'"{len(files[file])}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if body:
                self.wfile.write(files[file])

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield asked
        running.shutdown()
        thread.join()


def test_a_repository_of_the_hub_and_then_its_cache(server, state_dict, monkeypatch):
    loaded = read_foreign("hf://somebody/maxvit_small")
    assert loaded.info["model"]["name"] == NAME and loaded.info["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    np.testing.assert_array_equal(
        loaded.variables["params"]["backbone"]["stem"]["conv1"]["kernel"],
        state_dict["stem.conv1.weight"].transpose(2, 3, 1, 0),
    )
    # Offline the cache is enough, and nobody is asked.
    server.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, _, info = maxmap.load("hf://somebody/maxvit_small")
    assert not server and info["model"]["name"] == NAME
    assert model.backbone == create_model(NAME).backbone
    with pytest.raises(UserError, match="is not in the cache and the hub cannot be reached"):
        maxmap.load("hf://somebody/else")


def test_names_that_nobody_has(server):
    with pytest.raises(UserError, match="the hub has no repository somebody/nothing"):
        maxmap.load("hf://somebody/nothing")
    with pytest.raises(UserError, match=r"the nearest are timm/maxvit_tiny_tf_224\.in1k"):
        maxmap.load("timm/maxvit_tiny_tf_224.in2k")
    assert not [path for _, path in server if "maxvit_tiny" in path]


@pytest.mark.parametrize(
    "name, size, mean, crop, mode",
    [
        ("timm/maxvit_tiny_tf_224.in1k", 224, 0.485, 0.95, "center"),
        ("timm/maxvit_tiny_tf_384.in1k", 384, 0.5, 1.0, "squash"),
        ("timm/convnext_tiny.fb_in22k_ft_in1k_384", 384, 0.485, 1.0, "squash"),
        ("map_convnext_tiny", 224, 0.485, 0.875, "center"),
    ],
)
def test_preprocessing_of_some(name, size, mean, crop, mode):
    pre = hub.published()[name]["preprocessing"]
    assert (pre["image_size"], pre["mean"][0], pre["crop_pct"], pre["crop_mode"]) == (size, mean, crop, mode)


def test_the_table_is_that_of_timm():
    """Every tag with weights of the families that both have, in each of its columns."""
    from tests.reference import import_timm

    timm = import_timm()
    for name, row in hub.published().items():
        if name.startswith("timm/"):
            config = timm.models.get_pretrained_cfg(name.removeprefix("timm/"))
            pre = row["preprocessing"]
            assert config.num_classes == row["classes"] and config.input_size[-1] == pre["image_size"], name
            assert (config.crop_pct, config.interpolation) == (pre["crop_pct"], pre["interpolation"]), name
            assert (config.crop_mode or "center", list(config.mean), list(config.std)) == (
                pre["crop_mode"],
                pre["mean"],
                pre["std"],
            ), name


def test_weights_under_two_names_have_one_preprocessing():
    """sail-sg's and FAIR's own releases are among timm's, with other tags."""
    rows = hub.published()
    tags = {"": "sail_in1k", "_384": "sail_in1k_384", "_in21k": "sail_in22k"}
    tags |= {"_in21ft1k": "sail_in22k_ft_in1k", "_384_in21ft1k": "sail_in22k_ft_in1k_384"}
    compared = 0
    for name, row in rows.items():
        base, ending = re.fullmatch(r"(?:sail/)?(\w+?former\w*?_[smb]\d\d|.*?)((?:_384)?(?:_in21\w+)?)", name).groups()
        if name.startswith("sail/") and (twin := rows.get(f"timm/{base}.{tags[ending]}")):
            assert row["preprocessing"] == twin["preprocessing"] and row["classes"] == twin["classes"], name
            compared += 1
        if name.startswith("fair/"):
            model, _, classes = name.removeprefix("fair/").rpartition("_")
            assert row["preprocessing"] == rows[f"timm/{model}.fb_in{classes}"]["preprocessing"], name
            compared += 1
    assert compared == 8 * 5 + 5 + 4


# As the authors of MAP say in their commands: validate.py ... --crop-pct 0.95.
MAP_CROPS = {"map_convnext_tiny": 0.875, "map_convnext_small": 0.875}


def test_maps_releases_have_the_crop_of_their_commands():
    for name, row in hub.published().items():
        if name.startswith("map_"):
            pre = row["preprocessing"]
            wanted = (MAP_CROPS.get(name, 0.95), "center", "bicubic", 224, [0.485, 0.456, 0.406])
            assert (*(pre[key] for key in ("crop_pct", "crop_mode", "interpolation", "image_size", "mean")),) == wanted


def test_releases_come_from_their_address(tmp_path, monkeypatch):
    """Whole or not at all, and only once."""
    source = tmp_path / "map_pit_s.pth.tar"
    source.write_bytes(b"weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = hub.published()["map_pit_s"]
    monkeypatch.setitem(hub.published(), "map_pit_s", {**row, "url": source.as_uri()})
    path = hub.download("map_pit_s")
    assert path == tmp_path / "cache/maxmap/map_pit_s.pth.tar" and path.read_bytes() == source.read_bytes()
    source.unlink()
    assert hub.download("map_pit_s") == path
    path.unlink()
    with pytest.raises(UserError, match="cannot be downloaded"):
        hub.download("map_pit_s")
    assert list((tmp_path / "cache/maxmap").iterdir()) == []


def test_what_the_network_says_is_a_sentence(monkeypatch):
    def fail(repository, file, *, cached_only):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "_hub_fault", lambda repository, file: None)
    monkeypatch.setattr(hub, "_download_from_hub", fail)
    with pytest.raises(UserError, match=r"somebody/else cannot be downloaded \(ConnectionError: no route\)"):
        hub.download("hf://somebody/else")


@contextlib.contextmanager
def listening(answer):
    """A server that gives each connection to `answer` in a thread; yields its address and the list of connections."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # the server is closed
                    return
                connections.append(connection)
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def refuse(connection):
    connection.close()


def overload(connection):
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    "answer, why",
    [(refuse, r"\w+: .+"), (lambda _: None, r"\w*Timeout.*"), (overload, "it answers with the status 503")],
    ids=["refuses", "never answers", "is overloaded"],
)
@pytest.mark.parametrize("name", ["hf://somebody/else", "maxvit_tiny_tf_224.in1k", "caformer_s18"])
def test_a_hub_that_cannot_be_reached_is_asked_once(answer, why, name, monkeypatch, tmp_path, capfd):
    """One connection, one sentence, and nothing else is printed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_PATIENCE", 0.2)
    row = {**hub.published()["map_pit_s"], "url": "hf://somebody/weights/file.pth"}
    monkeypatch.setitem(hub.published(), "caformer_s18", row)
    with listening(answer) as (address, connections):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match=rf"is not in the cache and the hub cannot be reached \({why}\): download"):
            maxmap.load(name)
        assert len(connections) == 1
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(hub, "_PATIENCE", 60)
    with listening(lambda _: None) as (address, connections):
        monkeypatch.setenv("HF_ENDPOINT", address)

        def interrupt():
            while not connections:
                time.sleep(0.01)
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
        began = time.monotonic()
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                hub.download("hf://somebody/else")
        finally:
            signal.signal(signal.SIGINT, before)
        thread.join()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224.in1k", "hf-hub:timm/maxvit_tiny_tf_224.in1k"])
def test_names_of_timm_need_no_owner(name):
    assert hub.is_name(name) and hub.full_name(name) == "timm/maxvit_tiny_tf_224.in1k"


def test_a_tag_that_timm_does_not_have_is_a_sentence_and_a_file_is_no_tag():
    with pytest.raises(
        UserError, match=r"there is no checkpoint timm/maxvit_tiny_tf_224\.in2k .*; the nearest are timm/"
    ):
        maxmap.load("maxvit_tiny_tf_224.in2k")
    for path in ("maxvit_tiny_tf_224.pth", "runs/maxvit_tiny_tf_224.in1k"):
        assert not hub.is_name(path)
        with pytest.raises(UserError, match=f"there is no checkpoint in {path}"):
            maxmap.load(path)
