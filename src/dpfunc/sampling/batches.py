"""Batches of a few padded sizes, from columns or from any data set, loaded here or by workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpfunc import _checks, random, trees
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.sampling.poisson import loading_seed, poisson_indices, uniform_subset
from dpfunc.sampling.sources import Gather, check_workers, source
from dpfunc.sampling.workers import Task, ahead, here
from dpfunc.typing import Key, Tree


class Batch(NamedTuple):
    """The examples of one step, padded to a size that few batches differ in."""

    data: Tree
    """Leaves (B, ...); rows where mask is False are zeros."""
    mask: Tensor
    """(B,) bool, True for a real example."""
    step: Tensor
    """0-d int64: which step this is. The step folds it into the key."""


def poisson_batches(
    data: Any,
    key: Key,
    mechanism: DPSGD,
    *,
    num_steps: int,
    pad_to_multiple_of: int | None = None,
    start: int = 0,
    max_batch_size: int | None = None,
    collate: Callable[[list[Any]], Tree] = default_collate,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Draw the Poisson batches of a run, one for each step.

    Args:
        data: a pytree of tensors and NumPy arrays, every leaf (N, ...), memory-mapped files among
            them; or a data set with `__len__` and `__getitem__` (or `__getitems__`, which gets the
            list of indices), such as a torch Dataset or a Hugging Face table.
        key: the run's key, the same that the step gets.
        mechanism: whose sampling_prob is drawn with.
        num_steps: length of the whole run, >= 0.
        pad_to_multiple_of: batches are filled up with zero rows to a multiple of this, at least
            one. None: a power of two near 4 sqrt(expected_batch_size), so that a run sees about
            three sizes and a compiled step about three graphs.
        start: the first step to draw: a resumed run begins where it stopped, at no cost.
        max_batch_size: the most real examples in a batch; past it a uniform subset stays. Needs
            `sampling="truncated_poisson"` in the mechanism, because that is what must be accounted.
            None: a larger batch gets more padding steps; bound its memory with chunk_size.
        collate: makes a pytree with a leading batch axis of a list of examples of a data set.
        num_workers: processes that load up to two batches each ahead; 0 loads in this one. How,
            never what: a data set that draws from global generators finds them seeded, in a worker,
            for the step. Data that goes to workers is on the CPU.

    Returns:
        Iterator over `Batch(data, mask, step)` for the steps start, ..., num_steps - 1.

    Guarantees:
        Batch t is a function of (data, key, t): resuming gives the batches of the whole run.
        Neither workers nor batches they have loaded ahead change that.
        No step is skipped: an empty draw is a batch of padding alone.
        Time and memory of a step are O(batch), however large the data: a memory-mapped file is read
        where rows were drawn. Global generators of this process are not used.
        Which examples are in a batch, how many and in what order, is PRIVATE. The padded size shows
        their number to within pad_to_multiple_of, to whoever can watch time or memory; it is not
        part of what is released.

    Raises:
        ValueError: a schedule of the mechanism is shorter than num_steps, leaves disagree on N, data
            is empty, max_batch_size without "truncated_poisson"
            or the reverse, a number out of range, or (while iterating) a collate function that
            returns another number of rows than it got examples.
        TypeError: data is neither columns nor a data set, or holds what is no number.
        RuntimeError: (while iterating) an example fails to load; its index is said.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, "take a random sample".

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=10)
    >>> batches = poisson_batches(torch.arange(100.0), random.key(0), mechanism, num_steps=3)
    >>> [len(batch.data) for batch in batches]
    [16, 16, 16]
    """
    random.check_key(key)
    check_mechanism(mechanism)
    num_steps = _checks.integer(at_least=0, num_steps=num_steps)
    start = _checks.integer(at_least=0, start=start)
    if start > num_steps:
        raise ValueError(f"Expected start <= num_steps={num_steps} (the whole run's), got {start}.")
    mechanism.check_covers(num_steps)
    if pad_to_multiple_of is None:
        pad_to_multiple_of = 2 ** round(math.log2(4 * math.sqrt(mechanism.expected_batch_size) + 1))
    multiple = _checks.integer(at_least=1, pad_to_multiple_of=pad_to_multiple_of)
    if mechanism.sampling not in ("poisson", "truncated_poisson", "none"):
        raise ValueError(
            f"Expected a mechanism with Poisson sampling, got sampling={mechanism.sampling!r}."
        )
    if (max_batch_size is not None) != (mechanism.sampling == "truncated_poisson"):
        raise ValueError(
            "Expected max_batch_size= together with sampling='truncated_poisson' in the mechanism, got "
            f"{max_batch_size} with {mechanism.sampling!r}. Truncation changes what must be accounted."
        )
    if max_batch_size is not None:
        max_batch_size = _checks.integer(at_least=1, max_batch_size=max_batch_size)
    num_workers = _checks.integer(at_least=0, num_workers=num_workers)
    num_examples, gather = source(data, collate)
    load = partial(_batch, gather)
    draws = not isinstance(data, (Tensor, np.ndarray, tuple, Mapping))  # or may do so, row by row
    if num_workers:
        check_workers(data)
    else:
        gather(torch.empty(0, dtype=torch.int64))  # unusable data is refused at the call

    def drawn(step: int) -> _Drawn:
        prob = mechanism.sampling_prob_at(step)
        indices = poisson_indices(num_examples, key, step, sampling_prob=prob)
        if max_batch_size is not None and len(indices) > max_batch_size:
            subset_key = random.derive(key.cpu(), random.TRUNCATION, step)
            indices = indices[uniform_subset(subset_key, len(indices), max_batch_size)]
        return _Drawn(indices, max(1, -(-len(indices) // multiple)) * multiple, step)

    def batches() -> Iterator[Batch]:
        steps = range(start, num_steps)
        tasks = (Task(drawn(step), loading_seed(key, step)) for step in steps)
        if num_workers:
            loaded = ahead(load, tasks, num_workers)
        elif draws:
            loaded = (here(load, task) for task in tasks)
        else:
            loaded = (load(drawn(step)) for step in steps)
        with closing(loaded):
            for batch in loaded:
                yield batch._replace(step=batch.step.to(key.device))

    return batches()


class _Drawn(NamedTuple):
    indices: Tensor
    size: int
    step: int


def _batch(gather: Gather, drawn: _Drawn) -> Batch:
    """Gather what was drawn and fill it up with zeros."""
    found = trees.map(lambda leaf: _padded(leaf, drawn.size), gather(drawn.indices))
    rows = torch.arange(drawn.size, device=trees.leaves(found)[0].device)
    return Batch(found, rows < len(drawn.indices), torch.tensor(drawn.step))


def _padded(leaf: Tensor, size: int) -> Tensor:
    out = leaf.new_zeros(size, *leaf.shape[1:])
    out[: leaf.shape[0]] = leaf
    return out
