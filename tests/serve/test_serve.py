"""The server over real sockets: `predict`'s answers under load, one sentence for what it refuses, a clean end."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import maxmap
from maxmap.__main__ import main
from maxmap.pictures import overlay
from maxmap.serve import app
from maxmap.serve.app import make_app
from maxmap.serve.limits import Limits
from maxmap.serve.network import Network
from maxmap.serve.server import listen, make_server
from tests.tiny import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")
LIMITS = Limits(bytes=200_000, pixels=1_000_000)


@contextlib.contextmanager
def serving(network, limits: Limits, *, explained: bool = False) -> Iterator[int]:
    """Serves in a thread, and yields the port."""
    with listen("127.0.0.1", 0) as listening:
        server = make_server(make_app(network, limits, explained=explained))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ask(port: int, path: str, body: bytes | None = None, method: str | None = None) -> tuple[int, str, bytes]:
    """Returns status, type and content of an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, body)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()


def png(image: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(image).save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def served(odd_run) -> Iterator[SimpleNamespace]:
    """A served network, the sizes of the batches that it was asked for, and an event without which it waits."""
    network, sizes, go_on = Network(odd_run.folder, (8, 1)), [], threading.Event()
    go_on.set()
    network.compile(explained=True)
    classify = network.classify

    def noted(images):
        go_on.wait()
        sizes.append(len(images))
        return classify(images)

    network.classify = noted
    paths = sorted(odd_run.photos.glob("*/*/*"))
    with serving(network, LIMITS, explained=True) as port:
        yield SimpleNamespace(port=port, network=network, sizes=sizes, go_on=go_on, paths=paths, folder=odd_run.folder)


def test_two_hundred_at_once_get_what_predict_says(served):
    """And nothing is compiled for them, though they come together in batches of any number."""
    files = [path.read_bytes() for path in served.paths]
    compiled = served.network._compute._cache_size()
    served.go_on.clear()
    with ThreadPoolExecutor(200) as clients:
        asked = clients.map(lambda i: ask(served.port, "/predict?top=3", files[i % len(files)]), range(200))
        while json.loads(ask(served.port, "/health")[2])["requests"] < 200:
            pass
        served.go_on.set()
        found = list(asked)
    wanted = maxmap.predict(served.folder, served.paths, top=3)
    for i, (status, kind, content) in enumerate(found):
        assert (status, kind) == (200, "application/json")
        rows, expected = json.loads(content)["classes"], wanted[i % len(files)]
        assert [row["class"] for row in rows] == [name for name, _ in expected]
        np.testing.assert_allclose([row["probability"] for row in rows], [value for _, value in expected], rtol=1e-4)
    assert sum(served.sizes) == 200 and 1 < max(served.sizes) <= 8
    assert served.network._compute._cache_size() == compiled == 2


def test_where_the_network_looked(served):
    model, variables, info = maxmap.load(served.folder)
    path, name = served.paths[0], info["classes"][1]
    status, kind, content = ask(served.port, f"/explain?class={urllib.parse.quote(name)}", path.read_bytes())
    assert (status, kind) == (200, "image/png")
    explained = maxmap.explain(model, variables, jnp.asarray(maxmap.preprocess(path, info)), [1])
    pixels = np.rint((maxmap.preprocess(path, info)[0] * info["preprocessing"]["std"] + 0.5) * 255).astype(np.uint8)
    seen = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    assert np.abs(seen - overlay(pixels, explained.saliency[0])).max() <= 1
    likeliest = maxmap.predict(served.folder, [path], top=1)[0][0][0]
    own, chosen = (
        ask(served.port, f"/explain{query}", path.read_bytes())
        for query in ("", f"?class={urllib.parse.quote(likeliest)}")
    )
    assert own == chosen


def test_the_page_and_the_health(served):
    status, kind, content = ask(served.port, "/")
    page = content.decode()
    assert status == 200 and kind.startswith("text/html")
    assert page.count("<script>") == 1 and not re.search(r"(src|href)=", page) and "https:" not in page
    status, _, content = ask(served.port, "/health")
    assert status == 200 and json.loads(content) == {
        "status": "ok",
        "model": "convnext_tiny",
        "step": 6,
        "weights": "raw",
        "classes": 3,
        "requests": 0,
    }


NOISE = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/predict", b"", 400, "the request has no body"),
        ("/predict?top=0", png(NOISE), 400, "top is '0': give a number"),
        ("/predict?top=many%0A", png(NOISE), 400, r"top is 'many\\n': give a number"),
        ("/predict", b"no image", 415, "this is no image that can be read (the file is no image of a known format"),
        ("/predict", png(NOISE)[:2000], 415, "this is no image that can be read ("),
        ("/explain", b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "this is no image that can be read ("),
        ("/predict", bytes(8_000_000), 413, "the image has more than 200,000 bytes"),
        ("/predict", png(np.zeros((1001, 1000, 3), np.uint8)), 413, "the image has more than 1,000,000 pixels"),
        ("/explain?class=%3Cb%3E", png(NOISE), 400, "there is no class '<b>'; the nearest are <b>"),
        ("/predict", None, 405, "Method Not Allowed"),
        ("/nothing", None, 404, "Not Found"),
    ],
)
def test_what_is_refused(served, path, body, status, says):
    found, kind, content = ask(served.port, path, body)
    (sentence,) = json.loads(content).values()
    assert (found, kind) == (status, "application/json") and says in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_too_many_at_a_time_too_slow_and_a_failure(monkeypatch):
    """A third request is refused while two wait; a network that fails is said, and the next request is answered."""
    entered, go_on, fail = threading.Semaphore(0), threading.Event(), []

    def classify(images):
        entered.release()
        go_on.wait()
        if fail:
            raise ArithmeticError(fail.pop())
        return np.full((len(images), 2), 0.5)

    preprocessing = {
        "image_size": 8,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
    }
    info = {
        "model": {"name": "fake"},
        "classes": ["a", "b"],
        "step": 0,
        "weights": "raw",
        "preprocessing": preprocessing,
    }
    network = SimpleNamespace(info=info, largest=1, classify=classify)
    with serving(network, Limits(requests=2)) as port, ThreadPoolExecutor(2) as clients:
        inside = [clients.submit(ask, port, "/predict", png(NOISE)) for _ in range(2)]
        entered.acquire()
        while json.loads(ask(port, "/health")[2])["requests"] < 2:
            pass
        status, _, content = ask(port, "/predict", png(NOISE))
        assert status == 503 and json.loads(content) == {"error": "2 requests are being answered: try again later."}
        assert ask(port, "/explain", png(NOISE))[0] == 404  # not asked for at the start
        go_on.set()
        assert [answer.result()[0] for answer in inside] == [200, 200]
        monkeypatch.setattr(app, "_MOST_HELD", 1000)
        status, _, content = ask(port, "/predict", png(NOISE))
        assert status == 503 and b"too many images are waiting: try again later." in content
        monkeypatch.setattr(app, "_MOST_HELD", 1 << 20)
        monkeypatch.setattr(app, "_SECONDS", 0.01)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.putrequest("POST", "/predict")
            connection.putheader("Content-Length", "9")
            connection.endheaders(b"slow")
            assert connection.getresponse().status == 408
        monkeypatch.setattr(app, "_SECONDS", 60)
        fail.append("broken")
        assert ask(port, "/predict", png(NOISE))[::2] == (500, b'{"error":"the server has failed; its log says why."}')
        assert ask(port, "/predict", png(NOISE))[0] == 200


def test_the_command_ends_well(odd_run, tmp_path):
    """After SIGTERM it still answers what it has taken, says nothing and returns 0; so it does after Ctrl-C."""
    command = [
        sys.executable,
        "-m",
        "maxmap",
        "serve",
        str(odd_run.folder),
        "--port=0",
        "--batch-sizes=1",
        "--no-explain",
    ]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())[1])
        body = next(odd_run.photos.glob("*/*/*")).read_bytes()
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            connection.sendall(head + body[:100])
            assert ask(port, "/health")[0] == 200
            process.send_signal(signal.SIGTERM)
            connection.sendall(body[100:])
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert err == "maxmap: compiling; requests wait until then.\n"


def test_mistakes_are_one_sentence(odd_run, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for argv, says in (
            ([str(odd_run.folder), f"--port={port}"], f"cannot listen at 127.0.0.1, port {port} ("),
            ([str(odd_run.folder), "--host=no.such.host.", "--port=0"], "cannot listen at no.such.host., port 0 ("),
            ([str(tmp_path / "none"), "--port=0"], "none"),
        ):
            assert main(["serve", *argv]) == 2
            err = capsys.readouterr().err
            assert err.startswith("maxmap: ") and err.count("\n") == 1 and says in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(odd_run.folder)]) == 2
    assert "serve takes the package starlette: pip install starlette uvicorn." in capsys.readouterr().err
