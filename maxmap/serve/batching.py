"""Dynamic batching: what waits when the network is free is computed together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np


class Batcher:
    """Collects images of several requests into batches.

    A batch has what waits when the one before is done: a single request does not wait for others, and batches grow with
    the load.

    Args:
      compute: makes results, `[N, ...]`, of N images.
      largest: images of a batch, at most.
    """

    def __init__(self, compute: Callable[[Sequence[np.ndarray]], Awaitable[np.ndarray]], largest: int):
        self._compute, self._largest = compute, largest
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()

    async def submit(self, image: np.ndarray) -> np.ndarray:
        """Returns the result of one image; raises what its batch raised."""
        result: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((image, result))
        return await result

    async def run(self) -> None:
        """Computes batches until it is cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._largest and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [entry for entry in batch if not entry[1].done()]  # some clients have gone
            if not batch:
                continue
            try:
                rows = await self._compute([image for image, _ in batch])
            except Exception as error:  # each of the requests raises it
                for _, result in batch:
                    if not result.done():
                        result.set_exception(error)
                continue
            for row, (_, result) in zip(rows, batch, strict=True):
                if not result.done():
                    result.set_result(row)
