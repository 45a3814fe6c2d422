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


@dataclasses.dataclass(frozen=True, eq=False)
class SampleOrder:
    """The endless order of the training samples: for each epoch a permutation of the images, or as many of one class as
    of another.

    Attributes:
      num_images: in the training split.
      repeats: how many samples of an image follow one another.
      epoch_length: samples in an epoch.
      seed: of the permutations and the random crops.
      labels: int `[num_images]`, for an epoch that has as many samples of one class as of another; None for the images
        as they are.
    """

    num_images: int
    repeats: int
    epoch_length: int
    seed: int
    labels: np.ndarray | None = None

    def index(self, position: int) -> int:
        """Returns the index of the image at a position."""
        epoch, offset = divmod(position, self.epoch_length)
        if self.labels is None:
            return int(permutation(self.num_images, self.seed, epoch)[offset // self.repeats])
        return int(balanced(self, epoch)[offset // self.repeats])

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


@functools.lru_cache(maxsize=2)
def balanced(order: SampleOrder, epoch: int) -> np.ndarray:
    """Returns the images of an epoch in order, int64 [num_images], as many from each class that has any.

    A class deals out its images one after the other, over the epochs, and shuffles them whenever all have been dealt.
    Where the classes do not divide an epoch, they take turns in giving one image more.
    """
    assert order.labels is not None
    by_class = np.argsort(order.labels, kind="stable")
    present, counts = np.unique(order.labels, return_counts=True)
    share, rest = divmod(order.num_images, len(present))
    ends = np.cumsum(counts)

    def before(epoch: int, place: int) -> int:
        """How many images the class at a place has dealt in the epochs before."""
        return epoch * share + max(-(-(epoch * rest - place) // len(present)), 0)

    dealt = [
        _deal(by_class[end - count : end], order.seed, int(label), before(epoch, place), before(epoch + 1, place))
        for place, (label, count, end) in enumerate(zip(present, counts, ends, strict=True))
    ]
    return _generator(order.seed, 0, epoch).permutation(np.concatenate(dealt))


def _deal(members: np.ndarray, seed: int, label: int, first: int, stop: int) -> np.ndarray:
    """Returns the images first ... stop - 1 of an endless row of a class's images, shuffled anew in each round."""
    rounds = range(first // len(members), -(-stop // len(members)))
    row = [_generator(seed, 2 + label, number).permutation(members) for number in rounds]
    skipped = first - rounds.start * len(members)
    return np.concatenate([members[:0], *row])[skipped : skipped + stop - first]


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Returns a generator of its own for each (seed, stream, number): Philox makes one without any set-up cost."""
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, stream, number)))
