"""Many independent runs of the user's own step at once, with canaries in or out by fair coins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpfunc import random, trees
from dpfunc.audit.canaries import Canaries, Marked, flat, marked_data
from dpfunc.events import Log, append
from dpfunc.sampling import Batch
from dpfunc.step import PartialEvent
from dpfunc.typing import Key, Loss, Params, Tree

Draw = Callable[[int, Tensor, int], Tensor]
"""`draw(num_examples, key, step) -> indices`: the sampler of the pipeline under audit."""


class Observations(NamedTuple):
    """What R runs showed of m canaries."""

    projections: NDArray[np.float64]
    """(R, T, m): how far step t moved the parameters against each canary's watched direction."""
    losses: NDArray[np.float64]
    """(R, m): the canaries' losses at the last parameters; NaN for gradient canaries."""
    coins: NDArray[np.bool_]
    """(R, m): whether the canary was in the data of the run."""

    def runs(self, begin: int, end: int | None) -> Observations:
        """Some of the runs."""
        return Observations(
            self.projections[begin:end], self.losses[begin:end], self.coins[begin:end]
        )


def observe(
    step: Callable[..., Any],
    loss: Loss,
    params: Params,
    data: Tree,
    canaries: Canaries,
    key: Key,
    *,
    draw: Draw,
    num_steps: int,
    num_replicas: int,
    replicas_at_once: int,
    progress: bool = False,
) -> tuple[Observations, Log]:
    """Run a step for a marked loss on data with canaries, and watch the released parameters.

    Each run has a key of its own, which its sampler and its step share, as in a user's loop. The
    coins come from another key. See `audit_step` for the arguments.
    """
    coin_key, run_key = random.split(key.cpu(), 2)
    coins = random.bits(coin_key, (num_replicas, len(canaries.watched))) % 2 == 1
    keys = random.split(run_key, num_replicas)
    rows = trees.map(
        lambda own, other: torch.cat([own, other.to(own)]),
        marked_data(data, canaries.examples.coordinates.shape[1]),
        canaries.examples,
    )
    parts, logs = [], []
    with _bar(progress, num_replicas * num_steps) as bar:
        for begin in range(0, num_replicas, replicas_at_once):
            mine = slice(begin, begin + replicas_at_once)
            state, moves, log = _run(
                step, params, rows, canaries, coins[mine], keys[mine], draw, num_steps, bar
            )
            parts.append((moves, _losses(loss, state, canaries.examples)))
            logs.append(log)
    projections, losses = (
        torch.cat(part).cpu().double().numpy() for part in zip(*parts, strict=True)
    )
    return Observations(projections, losses, coins.numpy()), logs[0]


def _run(
    step: Callable[..., Any],
    params: Params,
    rows: Marked,
    canaries: Canaries,
    coins: Tensor,
    keys: Tensor,
    draw: Draw,
    num_steps: int,
    bar: Callable[[int], Any],
) -> tuple[Params, Tensor, Log]:
    """Some runs together: the last parameters, (R, T, m) projections, and the log of one."""
    num_data = len(rows.scale) - coins.shape[1]
    # A canary that is out is not there: the sampler of such a run sees fewer examples.
    present = [torch.cat([torch.arange(num_data), num_data + c.nonzero()[:, 0]]) for c in coins]
    state, moves, log = _copies(params, len(present)), [], Log()
    for t in range(num_steps):
        drawn = [own[draw(len(own), k, t).cpu()] for own, k in zip(present, keys, strict=True)]
        stepped, event = _step(step, state, _batch(rows, drawn, t), keys)
        moved = flat(state, 1).double() - flat(stepped, 1).double()
        moves.append((moved[:, canaries.watched] * canaries.weights).sum(-1))
        if isinstance(event, PartialEvent):  # of a mechanism with schedules
            event = event.complete(step=t)
        state, log = stepped, append(log, event)
        bar(len(present))
    return state, torch.stack(moves, 1), log


def _copies(params: Params, num: int) -> Params:
    return trees.map(lambda p: p.detach().expand(num, *p.shape).clone(), params)


def _batch(rows: Marked, drawn: list[Tensor], step: int) -> Batch:
    """The runs' batches of one step, padded to one size: leaves (R, B, ...), mask (R, B)."""
    size = max(8, -(-max(map(len, drawn)) // 8) * 8)
    places = torch.zeros(len(drawn), size, dtype=torch.int64)
    mask = torch.zeros(len(drawn), size, dtype=torch.bool)
    for place, real, own in zip(places, mask, drawn, strict=True):
        place[: len(own)] = own
        real[: len(own)] = True
    device = trees.leaves(rows)[0].device
    return Batch(
        trees.map(lambda leaf: leaf[places.to(device)], rows), mask.to(device), torch.tensor(step)
    )


def _step(step: Callable[..., Any], state: Params, batch: Batch, keys: Tensor) -> tuple[Any, Any]:
    """All runs through one step: mapped over keys, or as it is where there is one run."""
    events: list[Any] = []

    def one(params: Params, data: Tree, mask: Tensor, key: Key) -> Params:
        stepped = step(params, Batch(data, mask, batch.step), key)
        if not isinstance(stepped, tuple) or len(stepped) != 2:
            raise TypeError(
                f"Expected step(params, batch, key) to return (params, event), got {type(stepped).__name__}."
            )
        events.append(stepped[1])
        return stepped[0]

    keys = keys.to(batch.mask.device)
    if len(keys) > 1:
        return torch.vmap(one)(state, batch.data, batch.mask, keys), events[0]
    alone = [
        trees.map(lambda leaf: leaf[0], tree) for tree in (state, batch.data, batch.mask, keys)
    ]
    return trees.map(lambda leaf: leaf.unsqueeze(0), one(*alone)), events[0]


def _losses(loss: Loss, state: Params, examples: Marked) -> Tensor:
    """(R, m) losses of the canaries that have the user's loss; that of the others says nothing new."""
    runs = len(trees.leaves(state)[0])
    if bool((examples.scale > 0).all()):
        return torch.full((runs, len(examples.scale)), torch.nan)
    with torch.no_grad():
        return torch.vmap(torch.vmap(loss, (None, 0)), (0, None))(state, examples.data)


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[int], Any]]:
    if not progress:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="step", desc="auditing") as bar:
        yield bar.update
