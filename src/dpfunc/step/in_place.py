"""A step that writes the new state over the old one: compiled, it holds one state and not two."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.sampling import Batch
from dpfunc.step.make import TrainState
from dpfunc.typing import Key, Params

Init = Callable[[Params], TrainState]
Step = Callable[..., tuple[TrainState, Any]]


def in_place(train_step: tuple[Init, Step]) -> tuple[Init, Step]:
    """Let a step write its result over the state that it is given.

    A pure step has the old and the new state in memory at once. Compile this one,
    `torch.compile(step, fullgraph=True)`, and every leaf is updated where it lies; eagerly it saves
    nothing.

    Args:
        train_step: (init, step), as `make_train_step` makes them.

    Returns:
        (init, step), to be called as before. The state that step returns is the one it was given.

    Guarantees:
        The numbers are those of the pure step. What init was given is neither written to nor kept.
        Leaves of one state share no memory, whatever the optimizer's init and update do.

    NOT PROTECTED: the state before is gone. Copy what is to be kept; and where a step has failed, go
    on from a checkpoint: from a state written in half it would be a second release under one key.

    Raises:
        TypeError: train_step is no (init, step). ValueError: a leaf changes shape or dtype.

    >>> from dpfunc import DPSGD, make_train_step, random
    >>> from dpfunc.optimizers import sgd
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> init, step = in_place(make_train_step(lambda w, x: w @ x, mechanism, sgd(0.1)))
    >>> state = init(torch.zeros(3))
    >>> batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    >>> after, event = step(state, batch, random.key(0))
    >>> after is state, int(state.step)
    (True, 1)
    """
    if (
        not isinstance(train_step, tuple)
        or len(train_step) != 2
        or not all(map(callable, train_step))
    ):
        raise TypeError(
            f"Expected train_step to be an (init, step) pair, got {train_step!r}. "
            "Make one with make_train_step; a step alone does not know whose memory it may write to."
        )
    init, step = train_step

    @wraps(init)
    def init_apart(params: Params) -> TrainState:
        return trees.map(_copied, init(params))

    @wraps(step)
    def overwrite(
        state: TrainState, batch: Batch, key: Key, noise_multiplier: Tensor | None = None
    ) -> tuple[TrainState, Any]:
        stepped, event = step(state, batch, key, noise_multiplier)
        # Copied first: a leaf of the new state may be one of the old (parameters kept for the next
        # step), which would be written over before it is read. A compiler drops the other copies.
        trees.map(_write, state, trees.map(_copied, stepped))
        return state, event

    return init_apart, overwrite


def _copied(leaf: Tensor) -> Tensor:
    return leaf.clone(memory_format=torch.contiguous_format)


def _write(old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(
            "Expected a step to keep the shape and dtype of every leaf of its state, got "
            f"{tuple(new.shape)}, {new.dtype} after {tuple(old.shape)}, {old.dtype}."
        )
    return old.copy_(new)
