"""The requests: what is taken, what is refused with one sentence, and what comes back."""

import asyncio
import contextlib
import functools
import io
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from maxmap.data.images import TooManyPixels
from maxmap.data.rows import preprocessed_crop
from maxmap.errors import nearest, printable, reason, shortened
from maxmap.serve.batching import Batcher
from maxmap.serve.limits import Limits
from maxmap.serve.network import Network
from maxmap.serve.page import POLICY, draw
from maxmap.tasks import SINGLE_LABEL
from maxmap.wordnet import words

_MOST_HELD = 1 << 29  # bytes of all images that have arrived and are not decoded yet
_SECONDS = 60  # in which an image has to arrive


def make_app(network: Network, limits: Limits, *, explained: bool) -> Starlette:
    """Returns the application.

    Its paths: `/` is a page, `/health` says what answers, `/predict?top=5` gives the likeliest classes of the image in
    the body as JSON, and `/explain?class=NAME` a PNG of where the network looked.

    Args:
      network: compiled.
      limits: of requests.
      explained: whether there is `/explain`.
    """
    return _Service(network, limits, explained).app


class _Service:
    def __init__(self, network: Network, limits: Limits, explained: bool):
        self._network, self._limits, self._explained = network, limits, explained
        self._decoders, self._device = ThreadPoolExecutor(thread_name_prefix="decode"), ThreadPoolExecutor(1, "device")
        self._inside = self._held = 0
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/predict", self._predict, methods=["POST"]),
        ]
        if explained:
            routes.append(Route("/explain", self._explain, methods=["POST"]))
        handlers: Mapping[Any, Callable[..., Any]] = {HTTPException: _refuse, Exception: _fail}
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Computes batches while the application runs."""
        self._batcher = Batcher(functools.partial(_in, self._device, self._network.classify), self._network.largest)
        task = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            task.cancel()
            for pool in (self._decoders, self._device):
                pool.shutdown()

    async def _page(self, request: Request) -> Response:
        page = draw(self._network.info, self._limits.bytes, explained=self._explained)
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def _health(self, request: Request) -> Response:
        info = self._network.info
        about = {"model": info["model"]["name"], "step": info["step"], "weights": info["weights"]}
        return JSONResponse({"status": "ok", **about, "classes": len(info["classes"]), "requests": self._inside})

    async def _predict(self, request: Request) -> Response:
        classes = self._network.info["classes"]
        text = request.query_params.get("top", "5")
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
            raise HTTPException(400, f"top is {shortened(text, 20)!r}: give a number of at least 1.")
        with self._admitted():
            row = await self._batcher.submit(await self._image(request))
        best = SINGLE_LABEL.named(row, classes, int(text))
        return JSONResponse(
            {"classes": [{"class": name, "words": words(name), "probability": value} for name, value in best]}
        )

    async def _explain(self, request: Request) -> Response:
        classes, name = self._network.info["classes"], request.query_params.get("class")
        if name is not None and name not in classes:
            raise HTTPException(
                400, f"there is no class '{shortened(name)}'; the nearest are {nearest(name, classes)}."
            )
        with self._admitted():
            image = await self._image(request)
            label = int((await self._batcher.submit(image)).argmax()) if name is None else classes.index(name)
            seen = await _in(self._device, self._network.explain, image, label)
        written = io.BytesIO()
        Image.fromarray(seen).save(written, "PNG")
        return Response(written.getvalue(), media_type="image/png")

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts a request, and refuses it where too many are there."""
        if self._inside >= self._limits.requests:
            raise _busy(f"{self._inside} requests are being answered")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def _image(self, request: Request) -> np.ndarray:
        """Returns the image in the body of a request as the network sees it, uint8 `[H, W, C]`."""
        body = bytearray()
        try:
            async with asyncio.timeout(_SECONDS):
                await self._read(request, body)
            if not body:
                raise HTTPException(400, "the request has no body: send the bytes of an image file.")
            crop = functools.partial(preprocessed_crop, max_pixels=self._limits.pixels)
            return await _in(self._decoders, crop, bytes(body), self._network.info["preprocessing"])
        except TimeoutError:
            raise HTTPException(408, f"the image has not arrived within {_SECONDS} seconds: send it again.") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client has gone.") from None
        except TooManyPixels:
            most = f"{self._limits.pixels:,}"
            raise HTTPException(413, f"the image has more than {most} pixels: send a smaller one.") from None
        except OSError as error:
            raise HTTPException(
                415, f"this is no image that can be read ({shortened(reason(error))}): send the bytes of an image file."
            ) from None
        finally:
            self._held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Reads the body of a request, and refuses one that is too large before all of it has arrived."""
        most = self._limits.bytes
        async for part in request.stream():
            if len(body) + len(part) > most:
                raise HTTPException(413, f"the image has more than {most:,} bytes: send a smaller one.")
            if self._held + len(part) > _MOST_HELD:
                raise _busy("too many images are waiting")
            body += part
            self._held += len(part)


async def _in(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a pool of threads."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"{why}: try again later.", headers={"Retry-After": "1"})


async def _refuse(request: Request, error: HTTPException) -> Response:
    """Answers what is refused: one sentence as JSON."""
    sentence = error.detail if error.detail.endswith(".") else f"{error.detail}: / says what there is."
    return JSONResponse({"error": printable(sentence)}, error.status_code, headers=error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Answers where the program is at fault; the server logs the error."""
    return JSONResponse({"error": "the server has failed; its log says why."}, 500)
