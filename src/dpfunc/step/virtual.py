"""Virtual batches: one release from a batch that is taken in parts, for batches larger than memory.

`chunk_size` bounds the memory of gradients; this bounds that of the data too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import _checks, trees
from dpfunc.mechanism import DPSGD
from dpfunc.sampling import Batch
from dpfunc.step.asked import States, initial_states
from dpfunc.step.release import Sums, check_batch, releasing, summing
from dpfunc.typing import Key, Loss, Params, Tree


class Accumulated(NamedTuple):
    """What the parts of a batch add up to so far. PRIVATE until it is released."""

    sums: Sums | None
    num_rows: int
    """Rows so far, padding among them."""
    step: int
    params: Params
    states: States
    versions: tuple[int, ...]
    ticket: list[str]
    """One for all that comes of one `init`: empty until a release was made from it."""

    def __repr__(self) -> str:
        return f"Accumulated(step={self.step}, released={bool(self.ticket)})"


class Accumulator(NamedTuple):
    """`init(params, step)`, `accumulate(state, params, part, key)`, `release(state, key)`."""

    init: Callable[..., Accumulated]
    accumulate: Callable[..., Accumulated]
    release: Callable[..., Any]


def make_accumulator(loss: Loss, mechanism: DPSGD, **options: Any) -> Accumulator:
    """Make the three functions that release one noisy gradient from a batch in parts.

    Args:
        loss, mechanism, options: as for `private_grad`, `make_train_step` where the mechanism has
            telemetry or adaptive clipping.

    Returns:
        An `Accumulator`:
        `init(params, step, states=None) -> state`, states those of a `TrainState` where there are queries;
        `accumulate(state, params, part, key) -> state`, part a `Batch` of the same step, as `parts_of`
        makes them, key the run's;
        `release(state, key) -> noisy grads`, or `(noisy grads, states)` with queries.

    Guarantees:
        The release is that of the whole batch in one step, bit for bit but for the order of the sum.
        No parts at all, or empty ones, release noise alone.
        It is made once: a second one from what came of the same `init`, or a further part after it,
        would share its noise, whose difference is a sum without any, and is an error. (Another
        `init` of the same key and step is another release: one (key, step) is one release.)
        All parts meet the very parameters that `init` got, unchanged in place.

    NOT PROTECTED: an example that is in two parts counts twice, and is bounded by twice the sensitivity.

    Raises:
        RuntimeError: released before; other parameters, or the same after they were written to.
        ValueError: a part of another step.

    Source: Abadi et al. 2016, arXiv:1607.00133, section 4, "lots" larger than batches.

    >>> from dpfunc import random
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=0.0, sampling_prob=0.1, expected_batch_size=2)
    >>> init, accumulate, release = make_accumulator(lambda w, x: w @ x, mechanism)
    >>> w, key = torch.zeros(2), random.key(0)
    >>> batch = Batch(torch.eye(2).repeat(3, 1), torch.ones(6, dtype=torch.bool), torch.tensor(0))
    >>> state = init(w, step=0)
    >>> for part in parts_of(batch, 4):
    ...     state = accumulate(state, w, part, key)
    >>> release(state, key)
    tensor([1.5000, 1.5000])
    """
    sums_of, release_of = summing(loss, mechanism, **options), releasing(mechanism)

    def init(params: Params, step: int | Tensor, states: States | None = None) -> Accumulated:
        trees.check_floating(params, "params", "Integers have no gradient.")
        step = _checks.integer(at_least=0, step=step)
        states = initial_states(mechanism, params) if states is None else states
        return Accumulated(None, 0, step, params, states, _versions(params), [])

    def accumulate(state: Accumulated, params: Params, part: Batch, key: Key) -> Accumulated:
        _check_open(state)
        check_batch(part)
        if int(part.step) != state.step:
            raise ValueError(f"Expected a part of step {state.step}, got one of {int(part.step)}.")
        same = trees.leaves(params), trees.leaves(state.params)
        if len(same[0]) != len(same[1]) or any(a is not b for a, b in zip(*same, strict=True)):
            raise RuntimeError(
                "Expected the parameters that init got, the same tensors, got others. All parts of a "
                "batch are differentiated at one point."
            )
        if _versions(params) != state.versions:
            raise RuntimeError(
                "Expected parameters that nothing has written to since init, got changed ones. "
                "Update them after the release."
            )
        sums = sums_of(params, part, key, state.states, state.num_rows)
        if state.sums is not None:
            sums = trees.map(torch.add, state.sums, sums)
        return state._replace(sums=sums, num_rows=state.num_rows + len(part.mask))

    def release(state: Accumulated, key: Key) -> Tree:
        _check_open(state)
        sums = state.sums
        if sums is None:
            zeros = trees.map(_zeros, state.params)
            sums = Sums(zeros, {n: torch.zeros_like(s) for n, s in state.states.items()})
        state.ticket.append("released")
        device = trees.leaves(state.params)[0].device
        step = torch.tensor(state.step, device=device)
        grads, states = release_of(sums, key, step, state.states)
        return (grads, states) if mechanism.queries else grads

    return Accumulator(init, accumulate, release)


def parts_of(batch: Batch, num_rows: int) -> Iterator[Batch]:
    """The parts of a batch that each have at most so many rows.

    Args:
        batch: data whose leaves have the batch axis in front.
        num_rows: in a part, >= 1.

    Guarantees:
        Together they are the batch, in order; an empty batch has one empty part.

    Raises:
        ValueError, TypeError: num_rows is no whole number >= 1.

    >>> batch = Batch(torch.arange(5), torch.ones(5, dtype=torch.bool), torch.tensor(0))
    >>> [part.data.tolist() for part in parts_of(batch, 2)]
    [[0, 1], [2, 3], [4]]
    """
    num_rows = _checks.integer(at_least=1, num_rows=num_rows)
    for begin in range(0, max(1, len(batch.mask)), num_rows):
        data, mask = trees.rows((batch.data, batch.mask), begin, begin + num_rows)
        yield Batch(data, mask, batch.step)


def _check_open(state: Accumulated) -> None:
    if not isinstance(state, Accumulated):
        raise TypeError(f"Expected state to be what init made, got {type(state).__name__}.")
    if state.ticket:
        raise RuntimeError(
            "Expected an accumulator that was not released, got one that was: a second release would "
            "have the same noise, and the difference of the two has none. Begin the next step with init."
        )


def _versions(params: Params) -> tuple[int, ...]:
    return tuple(0 if leaf.is_inference() else leaf._version for leaf in trees.leaves(params))


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
