"""Batches of a few padded sizes, from tensors or from any data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpfunc import _checks, random, trees
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.sampling.poisson import poisson_indices, uniform_subset
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
) -> Iterator[Batch]:
    """Draw the Poisson batches of a run, one for each step.

    Args:
        data: a pytree of tensors, every leaf (N, ...); or a data set with `__len__` and
            `__getitem__` (or `__getitems__`, which gets the list of indices).
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

    Returns:
        Iterator over `Batch(data, mask, step)` for the steps start, ..., num_steps - 1.

    Guarantees:
        Batch t is a function of (data, key, t): resuming gives the batches of the whole run.
        No step is skipped: an empty draw is a batch of padding alone.
        The number of real rows is PRIVATE. The padded size shows it to within
        pad_to_multiple_of, to whoever can watch time or memory; it is not part of what is released.

    Raises:
        ValueError: a schedule of the mechanism is shorter than num_steps, leaves disagree on N, data
            is empty, max_batch_size without "truncated_poisson"
            or the reverse, a number out of range, or (while iterating) a collate function that
            returns another number of rows than it got examples.
        TypeError: data is neither tensors nor a data set.

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
    num_examples, gather = _source(data, collate)

    def batches() -> Iterator[Batch]:
        for step in range(start, num_steps):
            prob = mechanism.sampling_prob_at(step)
            drawn = poisson_indices(num_examples, key, step, sampling_prob=prob)
            if max_batch_size is not None and len(drawn) > max_batch_size:
                subset_key = random.derive(key.cpu(), random.TRUNCATION, step)
                drawn = drawn[uniform_subset(subset_key, len(drawn), max_batch_size)]
            size = max(1, -(-len(drawn) // multiple)) * multiple
            found = gather(drawn, size)
            mask = torch.arange(size, device=trees.leaves(found)[0].device) < len(drawn)
            yield Batch(found, mask, torch.tensor(step, device=key.device))

    return batches()


def _source(
    data: Any, collate: Callable[[list[Any]], Tree]
) -> tuple[int, Callable[[Tensor, int], Tree]]:
    """The number of examples, and how to gather some of them into a tree of padded leaves."""
    if isinstance(data, (Tensor, tuple, Mapping)):
        num = trees.batch_size(data, "data")
        return num, lambda drawn, size: trees.map(
            lambda leaf: _padded(leaf[drawn.to(leaf.device)], size), data
        )
    if isinstance(data, list) and any(isinstance(entry, Tensor) for entry in data):
        raise TypeError(
            "Expected a tuple (or dict) of columns or a data set of rows, got a list of tensors, which "
            "could be either. Write (x, y) for columns, torch.stack(rows) for rows."
        )
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            "Expected data to be a pytree of tensors or a data set with __len__ and __getitem__, got "
            f"{type(data).__name__}. An iterable stream has no Poisson sample; of a DataLoader, pass its dataset."
        )
    num = len(data)
    if num == 0:
        raise ValueError("Expected data to hold at least one example, got an empty data set.")
    # The shapes of one example stand for all, so that an empty draw has a form to be empty in.
    blank = trees.map(lambda leaf: leaf[:0], _collated(data, [0], collate))

    def gather(drawn: Tensor, size: int) -> Tree:
        found = _collated(data, drawn.tolist(), collate) if len(drawn) else blank
        return trees.map(lambda leaf: _padded(leaf, size), found)

    return num, gather


def _collated(data: Any, indices: list[int], collate: Callable[[list[Any]], Tree]) -> Tree:
    """The examples as one tree of tensors, one row for each: more would be more than one's share."""
    found = trees.map(_as_tensor, collate(_examples(data, indices)))
    if trees.batch_size(found, "collate(examples)") != len(indices):
        # Without the two numbers: how many examples were drawn is private.
        raise ValueError(
            "Expected collate to return one row for each example, got another number of rows. "
            "Several rows of one example would each be clipped apart: average them in the loss."
        )
    return found


def _as_tensor(leaf: Any) -> Tensor:
    try:
        return torch.as_tensor(leaf)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"Expected collate to return tensors or numeric arrays, got a {type(leaf).__name__}."
        ) from None


def _examples(data: Any, indices: list[int]) -> list[Any]:
    if hasattr(data, "__getitems__"):
        return data.__getitems__(indices)
    return [data[i] for i in indices]


def _padded(leaf: Tensor, size: int) -> Tensor:
    out = leaf.new_zeros(size, *leaf.shape[1:])
    out[: leaf.shape[0]] = leaf
    return out
