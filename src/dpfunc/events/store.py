"""The runs that logs share: a store that is only ever added to, read as columns.

A log is a number of runs in a store and one run of its own, so that appending to a log of a million
runs copies none of them. Whoever finds the next place of a store taken by another run copies it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.events.event import StepEvent, kind_of


class Columns(NamedTuple):
    """Runs of a log as arrays, an entry a run. `count` is rounded up to a float, if it is not one."""

    noise_multiplier: NDArray[np.float64]
    sampling_prob: NDArray[np.float64]
    count: NDArray[np.float64]  # pyright: ignore[reportIncompatibleMethodOverride]
    kind: NDArray[np.int64]
    """The index of the run's kind in `Log.kinds`."""


class _Store:
    """Closed runs, which are only ever added to, and what was folded over them. Logs share it."""

    __slots__ = ("folds", "kinds", "lock", "runs", "table")
    WIDTH = 5  # of a row of the table: the fields of Columns, and how many kinds there are so far

    def __init__(self) -> None:
        self.runs: list[StepEvent] = []
        self.table = array("d")
        self.kinds: dict[tuple[Any, ...], int] = {}
        self.folds: dict[Hashable, tuple[int, Any]] = {}
        self.lock = Lock()

    def close(self, place: int, run: StepEvent) -> _Store:
        """A store that goes on with `run` after its first `place` runs: this one, or else a copy."""
        # The lock makes one step of seeing that a place is free and taking it: of two threads that
        # append to one log, the second finds the place taken, and shares it or copies.
        with self.lock:
            if place == len(self.runs):
                self._add(run)
            elif self.runs[place] != run:
                return self._copy(place, run)
            return self

    def _copy(self, place: int, run: StepEvent) -> _Store:
        copy = _Store()
        copy.runs = self.runs[:place]
        copy.table = self.table[: place * self.WIDTH]
        copy.kinds = {kind: i for i, kind in enumerate(self.kinds_before(place))}
        copy._add(run)
        return copy

    def _add(self, run: StepEvent) -> None:
        kind = self.kinds.setdefault(kind_of(run), len(self.kinds))
        # Written at its place, not at the end: what an interrupt leaves behind is written over.
        row = array("d", (*_numbers(run), kind, len(self.kinds)))
        self.table[len(self.runs) * self.WIDTH :] = row
        self.runs.append(run)

    def _num_kinds(self, place: int) -> int:
        return int(self.table[place * self.WIDTH - 1]) if place else 0

    def kinds_before(self, place: int) -> list[tuple[Any, ...]]:
        return list(self.kinds)[: self._num_kinds(place)]

    def columns(self, start: int, stop: int, last: StepEvent | None = None) -> Columns:
        """Runs start to stop, and then `last`."""
        size = max(0, stop - start)
        rows = np.empty((4, size + (last is not None)))
        with self.lock:  # the table cannot grow while it is read
            rows[:, :size] = np.asarray(self.table).reshape(-1, self.WIDTH)[start:stop, :4].T
        if last is not None:
            new = self._num_kinds(stop)
            rows[:, size] = *_numbers(last), min(new, self.kinds.get(kind_of(last), new))
        noise_multiplier, sampling_prob, count, kind = rows
        return Columns(noise_multiplier, sampling_prob, count, kind.astype(np.int64))


def _numbers(event: StepEvent) -> tuple[float, float, float]:
    count = float(event.count)
    if count < event.count:
        count = math.nextafter(count, math.inf)
    return event.noise_multiplier, event.sampling_prob, count
