"""Which records make up which batch: shuffled, sharded over processes, resumable."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxalign.data.balancing import TOLERANCE, balanced_groups
from jaxalign.data.mixtures import Mixture, Part
from jaxalign.errors import UserError

Iterations = Any
"""A Grain iterator: `next`, `get_state` (plain JSON values) and `set_state`."""

FOREVER = 2**40  # batches
WINDOW = 16
"""Batches of an epoch that are sorted by length together, for less padding."""
DRAWS = 512
"""Largest number of random draws for a batch that lies in two epochs."""
SMALLER = 0.03
"""Fraction by which such a batch may be smaller than others."""


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which examples make up which batch: a pure function of the seed and the batch's number.

    Each epoch is a permutation of all examples, and batches are cut off the stream of epochs. An
    epoch whose length is no multiple of the batch ends within a batch; the examples that the next
    epoch adds to it are others than those already there, so no batch holds an example twice unless
    there are fewer examples than a batch. The batches that lie within one epoch hold examples of
    like length: windows of them are sorted by length, cut into batches, and all batches of the
    epoch shuffled. With `sizes`, all batches have nearly the same size instead.
    """

    lengths: np.ndarray
    """Int [examples]: what to sort by."""
    sizes: np.ndarray | None = None
    """Int [examples, measures]: batches have nearly equal sums of each; None: sort by length."""
    batch_size: int
    seed: int
    shuffle: bool
    window: int
    """Batches of an epoch that are sorted together; 1 does not sort, nor make sizes equal."""
    epochs: int | None
    drop_remainder: bool
    mixture: Mixture | Part | None = None
    """Which examples an epoch has; None: all."""

    @property
    def examples(self) -> int:
        """Number of examples in an epoch."""
        return len(self.lengths) if self.mixture is None else self.mixture.examples

    @property
    def num_batches(self) -> int | None:
        """Batches in all; None: no end."""
        if self.epochs is None:
            return None
        examples = self.examples * self.epochs
        whole = examples // self.batch_size
        return whole if self.drop_remainder else -(-examples // self.batch_size)

    def batch(self, number: int) -> np.ndarray:
        """Int [batch_size or fewer]: the examples of a batch."""
        examples, size = self.examples, self.batch_size
        start = number * size
        stop = start + size if self.epochs is None else min(start + size, examples * self.epochs)
        first, last = start // examples, (stop - 1) // examples
        if examples < size:
            parts = [self._permutation(epoch) for epoch in range(first, last + 1)]
            return np.concatenate(parts)[start - first * examples : stop - first * examples]
        if first == last and stop - start == size:
            return self._inner_batches(first)[number - -(-first * examples // size)]
        tail = self._ends(first)[1]
        return tail if first == last else np.concatenate([tail, self._ends(last)[0]])

    def _members(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, in ascending order."""
        if self.mixture is None:
            return np.arange(len(self.lengths))
        return self.mixture.epoch(epoch, self.seed)

    def _permutation(self, epoch: int) -> np.ndarray:
        members = self._members(epoch)
        if not self.shuffle:
            return members
        return members[np.random.default_rng([self.seed, 0, epoch]).permutation(len(members))]

    def _ends(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's first and last examples, which share a batch with another epoch's.

        The first ones depend on the last ones of the epoch before, and so on from epoch 0. That
        takes at most two batches of random numbers an epoch.
        """
        known = self._known_ends
        while len(known) <= epoch:
            before = known[-1][1] if known else np.empty(0, np.int64)
            known.append(self._draw_ends(len(known), before))
        return known[epoch]

    @functools.cached_property
    def _known_ends(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return []

    def _draw_ends(self, epoch: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        examples, members = self.examples, self._members(epoch)
        head, tail = -epoch * examples % self.batch_size, (epoch + 1) * examples % self.batch_size
        if not self.shuffle:
            return members[:head], members[examples - tail :]
        rng = np.random.default_rng([self.seed, 2, epoch])
        nothing = np.empty(0, np.int64)
        first = self._draw(rng, members, before, head, before)
        return first, self._draw(rng, members, first, tail, nothing)

    def _draw(
        self,
        rng: np.random.Generator,
        members: np.ndarray,
        taken: np.ndarray,
        number: int,
        beside: np.ndarray,
    ) -> np.ndarray:
        """Int [number]: random members of an epoch, none of which is taken.

        With `sizes`: the first draw whose sum, with the examples beside it, is about the mean of as
        many; else, of many draws, the one that exceeds the mean least.
        """
        others = members[~np.isin(members, taken)]
        if self.sizes is None or self.window == 1 or not number:
            return others[rng.choice(len(others), number, replace=False)]
        target = self.sizes[members].mean(0) * (number + len(beside))
        given = self.sizes[beside].sum(0)
        best, least = None, np.inf
        for _ in range(DRAWS):
            drawn = others[rng.choice(len(others), number, replace=False)]
            excess = (given + self.sizes[drawn].sum(0)) / np.maximum(target, 1) - 1
            if excess.max() < least:
                best, least = drawn, excess.max()
            if excess.max() <= TOLERANCE and excess.min() >= -SMALLER:
                return drawn
        assert best is not None
        return best

    @functools.cached_property
    def _inner_batches(self) -> Callable[[int], np.ndarray]:
        return functools.lru_cache(maxsize=2)(self._plan_epoch)  # threads ask for neighbours

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """Int [batches, batch_size]: the batches that lie within an epoch, in order."""
        members = self._permutation(epoch)
        members = members[~np.isin(members, np.concatenate(self._ends(epoch)))]
        batches = members.reshape(-1, self.batch_size)
        if self.window > 1 and self.sizes is not None and len(batches):
            rng = np.random.default_rng([self.seed, 3, epoch])
            batches = members[balanced_groups(self.sizes[members], len(batches), rng)]
        elif self.window > 1:
            windows = np.array_split(batches, max(1, -(-len(batches) // self.window)))
            batches = np.concatenate([self._by_length(window) for window in windows])
        if self.shuffle:
            batches = np.random.default_rng([self.seed, 1, epoch]).permutation(batches)
        return batches

    def _by_length(self, batches: np.ndarray) -> np.ndarray:
        members = batches.ravel()
        order = np.argsort(self.lengths[members], kind="stable")
        return members[order].reshape(batches.shape)


def filled_batch(members: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples of a batch, filled with copies of the first one, and weights: 0 for copies."""
    copies = np.full(size - len(members), members[0], members.dtype)
    weight = (np.arange(size) < len(members)).astype(np.float32)
    return np.concatenate([members, copies]), weight


def share_of(values: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """A process's part of values, one for each row of a batch."""
    local = len(values) // process_count
    return values[process_index * local : (process_index + 1) * local]


def ordered_batches(
    lengths: np.ndarray,
    make: Callable[[np.ndarray, np.ndarray, np.ndarray], Any],
    *,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    window: int | None = None,
    drop_remainder: bool = False,
    mixture: Mixture | Part | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
) -> Iterations:
    """Batches of examples, in an order determined by the seed alone.

    Every epoch holds each example once, and a batch of at most as many examples as there are holds
    none twice (`BatchOrder`).

    Args:
      lengths: Int [examples]: what to sort by.
      make: (all examples of a batch, this process's padded with copies, their
        weights) -> the batch.
      batch_size: examples per batch, over all processes.
      seed: of the order.
      epochs: passes over the data; None: no end.
      shuffle: a new order in every epoch; off: as given.
      window: batches of an epoch that are sorted by length together (then all are shuffled); None:
        `WINDOW`, or 1 without `shuffle`, which keeps the order.
      drop_remainder: leave out a last, partial batch instead of padding it with weight 0.
      mixture: which examples an epoch has; None: all.
      process_index: this process; it gets rows [i * local, (i + 1) * local) of every batch.
      process_count: processes that share each batch; all see the same shapes.
      prefetch: batches prepared ahead, by threads.

    Returns:
      An iterator with `get_state` and `set_state`; its state is the number of the next batch, as
      plain JSON values, for any number of processes.
    """
    order = batch_order(
        lengths,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        shuffle=shuffle,
        window=window,
        drop_remainder=drop_remainder,
        mixture=mixture,
    )
    check_share(order, process_index, process_count)

    def share(members: np.ndarray) -> Any:
        filled, weight = filled_batch(members, batch_size)
        shares = (share_of(x, process_index, process_count) for x in (filled, weight))
        return make(members, *shares)

    return iterate(order, share, prefetch=prefetch)


def batch_order(
    lengths: np.ndarray,
    *,
    sizes: np.ndarray | None = None,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    window: int | None = None,
    drop_remainder: bool = False,
    mixture: Mixture | Part | None = None,
) -> BatchOrder:
    """A `BatchOrder`, its numbers checked; the arguments are those of `ordered_batches`."""
    window = (WINDOW if shuffle else 1) if window is None else window
    order = BatchOrder(
        lengths=lengths,
        sizes=sizes,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        window=window,
        epochs=epochs,
        drop_remainder=drop_remainder,
        mixture=mixture,
    )
    if window < 1:
        raise UserError(f"window: {window} is not a number of batches; use 1 or more")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs: {epochs} passes over the data; use 1 or more")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not a number of examples; use 1 or more")
    if order.num_batches == 0:
        raise UserError(
            f"batch_size: {batch_size} is more than the {order.examples} "
            "examples, and partial batches are dropped"
        )
    return order


def check_share(order: BatchOrder, process_index: int, process_count: int) -> None:
    """Raise `UserError` if the processes cannot share each batch."""
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index: {process_index} is not one of {process_count} processes")
    if order.batch_size % process_count:
        raise UserError(
            f"batch_size: {order.batch_size} is not a multiple of the {process_count} processes"
        )


def iterate(
    order: BatchOrder, make: Callable[[np.ndarray], Any], *, prefetch: int = 8
) -> Iterations:
    """The batches of an order.

    Args:
      order: of the examples.
      make: examples of a batch -> the batch.
      prefetch: batches prepared ahead, by threads.
    """
    import grain

    lock = threading.Lock()

    def locked(at: Any) -> Any:
        with lock:  # an epoch is planned once, not by every thread
            members = order.batch(int(at))
        return make(members)

    number = FOREVER if order.num_batches is None else order.num_batches
    options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(number).map(locked).to_iter_dataset(options))
