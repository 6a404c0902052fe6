"""Loading ahead in worker processes. They are told what to load; they see no key and draw nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader


class Task(NamedTuple):
    """What a worker loads, and what it seeds the global generators of its process with."""

    what: Any
    seed: int


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A map from tasks to what they load, in the form that DataLoader asks for."""

    load: Callable[[Any], Any]

    def __getitem__(self, task: Task) -> Any:
        _seed(task.seed)
        return self.load(task.what)


def _seed(seed: int) -> None:
    # A data set that draws (augmentation) draws the same in any process, and again on resuming.
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def here(load: Callable[[Any], Any], task: Task) -> Any:
    """`load(task.what)` in this process, as a worker would; its global generators stay as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    _seed(task.seed)
    try:
        return load(task.what)
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def ahead(load: Callable[[Any], Any], tasks: Iterable[Task], num_workers: int) -> Generator[Any]:
    """`load(task.what)` for each task, in their order, up to two for each worker ahead.

    Guarantees:
        What is loaded does not depend on the number of workers, nor on how far ahead they are.
        The global generators of this process are neither read nor moved.
    """
    loader = DataLoader(
        _Loaded(load),  # type: ignore[arg-type]
        sampler=tasks,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else a seed would come out of the global one
    )
    loaded = iter(loader)
    try:
        yield from loaded
    finally:
        # After an error the garbage collector would take the queues first, and then wait seconds
        # for each worker to hear of its end through them.
        getattr(loaded, "_shutdown_workers", lambda: None)()


def _as_it_is(loaded: Any) -> Any:
    return loaded
