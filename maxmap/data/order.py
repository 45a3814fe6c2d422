"""Which image comes when: the order of the samples and the rows of each process, as functions of (seed, step).

A position counts the samples of a run from its first step on, over all processes and epochs.
"""

import dataclasses
import functools

import numpy as np

# Rows that grain hands to a thread at a time. With 1 it costs 115 us of CPU per image, more than a crop of 32 px does;
# with 8 it is 12 us, with 32 it is 8. A whole batch gains nothing further, holds a batch per thread in memory, and
# delays the first one until a single thread has made all of it.
_CHUNK = 32

# timm's RepeatAugSampler, after DeiT's: an epoch with repeated augmentation is a multiple of this.
_REPEATS_ROUND = 256


def epoch_length(num_images: int, repeats: int) -> int:
    """Returns how many samples an epoch has, before the last partial batch is dropped."""
    if repeats == 1 or num_images < _REPEATS_ROUND:
        return num_images
    return num_images // _REPEATS_ROUND * _REPEATS_ROUND


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The endless order of the training samples, a permutation of the images for each epoch.

    Attributes:
      num_images: in the training split.
      repeats: how many samples of an image follow one another.
      epoch_length: samples in an epoch.
      seed: of the permutations and the random crops.
    """

    num_images: int
    repeats: int
    epoch_length: int
    seed: int

    def index(self, position: int) -> int:
        """Returns the index of the image at a position."""
        epoch, offset = divmod(position, self.epoch_length)
        return int(permutation(self.num_images, self.seed, epoch)[offset // self.repeats])

    def generator(self, position: int) -> np.random.Generator:
        """Returns the source of randomness of the sample at a position."""
        return _generator(self.seed, 1, position)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The positions of one process's rows, as a sequence of ranges; a range never crosses the end of a batch.

    Attributes:
      local_batch: rows of this process in a batch.
      process_index: which process this is.
      process_count: how many processes there are.
      start_step: step of the first batch.
      num_steps: number of batches.
    """

    local_batch: int
    process_index: int
    process_count: int
    start_step: int
    num_steps: int

    @property
    def per_batch(self) -> int:
        """Chunks in a batch."""
        return -(-self.local_batch // _CHUNK)

    def __len__(self) -> int:
        return self.num_steps * self.per_batch

    def __getitem__(self, number: int) -> range:
        step, chunk = divmod(int(number), self.per_batch)
        first = ((self.start_step + step) * self.process_count + self.process_index) * self.local_batch
        return range(
            first + chunk * self.local_batch // self.per_batch,
            first + (chunk + 1) * self.local_batch // self.per_batch,
        )


@functools.lru_cache(maxsize=2)  # two, because some threads reach the next epoch before others
def permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the images of an epoch in order, int64 [num_images]."""
    return _generator(seed, 0, epoch).permutation(num_images)


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Returns a generator of its own for each (seed, stream, number): Philox makes one without any set-up cost."""
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, stream, number)))
