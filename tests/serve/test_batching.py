"""Batches: what waits goes together, a failure reaches every request of its batch, and who has gone is left out."""

import asyncio

import numpy as np
import pytest

from maxmap.serve.batching import Batcher


async def answers(numbers: list[int], largest: int, fail: bool = False, gone: int | None = None):
    """Submits an image, and the others while it is computed; returns the sizes of the batches and the results."""
    sizes, started, go_on = [], asyncio.Event(), asyncio.Event()

    async def compute(images):
        sizes.append(len(images))
        started.set()
        await go_on.wait()
        if fail:
            raise ArithmeticError("broken")
        return np.stack([10 * image for image in images])

    batcher = Batcher(compute, largest)
    running = asyncio.create_task(batcher.run())
    tasks = [asyncio.create_task(batcher.submit(np.array([numbers[0]])))]
    await started.wait()
    tasks += [asyncio.create_task(batcher.submit(np.array([number]))) for number in numbers[1:]]
    await asyncio.sleep(0)
    if gone is not None:
        tasks[gone].cancel()
    go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    running.cancel()
    return sizes, results


def test_what_waits_is_computed_together():
    sizes, results = asyncio.run(answers(list(range(10)), 4))
    assert sizes == [1, 4, 4, 1]
    assert [result.tolist() for result in results] == [[10 * number] for number in range(10)]


def test_a_failure_reaches_every_request_and_the_next_batch_is_computed():
    sizes, results = asyncio.run(answers([1, 2, 3], 2, fail=True))
    assert sizes == [1, 2] and all(isinstance(result, ArithmeticError) for result in results)


@pytest.mark.parametrize("gone", [0, 2])
def test_who_has_gone_is_left_out(gone):
    """Also while the batch is computed, where the others still get their results."""
    sizes, results = asyncio.run(answers([1, 2, 3], 4, gone=gone))
    assert sizes == ([1, 2] if gone == 0 else [1, 1])
    assert [i for i, result in enumerate(results) if isinstance(result, asyncio.CancelledError)] == [gone]
    assert all(result.tolist() == [10 * (i + 1)] for i, result in enumerate(results) if i != gone)
