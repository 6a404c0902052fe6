"""The log: an immutable sequence of events in which what is alike runs together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import islice
from typing import Any, TypeAlias, TypeVar, final, overload

from dpfunc import _checks
from dpfunc.events.event import Kind, StepEvent, alike, kind_of, with_count
from dpfunc.events.store import Columns, _Store

_T = TypeVar("_T")


@final
class Log(Sequence[StepEvent]):
    """An immutable log of events in which equal neighbours are one event with their counts added.

    Iterate it, index it, slice it, compare and hash it as the tuple of its runs; add logs, tuples or
    lists of events with `+`. `()` equals the empty log.

    Args:
        events: what ran, in order. A Log is returned as it is.

    Guarantees:
        A log never changes, whatever is appended to it or to a log that it shares runs with, and in
        whichever thread. `log[:n]` shares them; a slice is a log, so equal neighbours in it merge.

    Raises:
        TypeError: something that is not a StepEvent.

    >>> event = StepEvent(noise_multiplier=1.0, sampling_prob=0.1)
    >>> log = Log([event, event]) + (StepEvent(noise_multiplier=2.0, sampling_prob=0.1),)
    >>> len(log), log[0].count, log.columns().noise_multiplier
    (2, 2, array([1., 2.]))
    """

    # The runs of a log are the first `_closed` of its store, and then `_last`, which may still merge.
    __slots__ = ("_closed", "_last", "_store")
    _store: _Store
    _closed: int
    _last: StepEvent | None

    def __new__(cls, events: Iterable[StepEvent] = ()) -> Log:
        if isinstance(events, Log):
            return events
        if isinstance(events, StepEvent):
            raise TypeError("Expected a log, got one StepEvent. Write (event,) for a log of one.")
        return reduce(append, events, _log(_Store(), 0, None))

    @property
    def closed(self) -> int:
        """How many runs nothing can merge with any more: all but the last."""
        return self._closed

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The distinct kinds in the log, in order of first appearance."""
        kinds = self._store.kinds_before(self._closed)
        last = () if self._last is None else (kind_of(self._last),)
        return tuple(map(Kind._make, dict.fromkeys((*kinds, *last))))

    def columns(self, start: int = 0) -> Columns:
        """The runs from index `start` on, as new arrays.

        Guarantees:
            An entry a run, in order; `kinds[kind]` is its kind; no count is below the event's.

        Raises:
            ValueError, TypeError: start is not a whole number >= 0.
        """
        start = _checks.integer(at_least=0, start=start)
        last = self._last if start <= self._closed else None
        return self._store.columns(start, self._closed, last)

    def folded(self, name: Hashable, fold: Callable[[_T | None, Columns], _T]) -> _T:
        """Fold over the closed runs, going on from where the last log with the same runs came to.

        Args:
            name: of this fold and of all its parameters; one value a name is remembered.
            fold: (value, columns of further runs) -> value, with None for the value before any.
                It must return a new value, never change the one it was given, and not depend on
                where the runs are cut: fold(fold(None, a), b) = fold(None, a + b).

        Returns:
            The value for the first `closed` runs; the last run, `columns(closed)`, is for the caller.

        Guarantees:
            Equals `fold(None, columns of all closed runs)`, as far as fold does not depend on cuts.
            Over a log that grows, each run is folded once.

        >>> event = StepEvent(noise_multiplier=1.0, sampling_prob=0.1, count=5)
        >>> log = Log([event, StepEvent(noise_multiplier=2.0, sampling_prob=0.1)])
        >>> log.folded("steps", lambda steps, new: (steps or 0.0) + float(new.count.sum()))
        5.0
        """
        folds = self._store.folds
        upto, value = folds.get(name, (0, None))
        if upto > self._closed:  # a longer log was folded; its value stays
            return fold(None, self._store.columns(0, self._closed))
        if value is None or upto < self._closed:
            value = fold(value, self._store.columns(upto, self._closed))
            folds[name] = self._closed, value
        return value

    def __len__(self) -> int:
        return self._closed + (self._last is not None)

    def __iter__(self) -> Iterator[StepEvent]:
        yield from islice(self._store.runs, self._closed)
        if self._last is not None:
            yield self._last

    @overload
    def __getitem__(self, index: int) -> StepEvent: ...
    @overload
    def __getitem__(self, index: slice) -> Log: ...
    def __getitem__(self, index: int | slice) -> StepEvent | Log:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            if chosen and chosen == range(len(chosen)):
                return _log(self._store, chosen[-1], self[chosen[-1]])
            return Log(self[i] for i in chosen)
        if chosen == self._closed and self._last is not None:
            return self._last
        return self._store.runs[chosen]

    def __add__(self, other: Any) -> Log:
        other = Log(other)
        return reduce(append, other, self) if self else other

    def __radd__(self, other: Any) -> Log:
        return Log(other) + self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Log, tuple)):
            return NotImplemented
        return tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Log({list(self)!r})"

    def __reduce__(self) -> tuple[type[Log], tuple[tuple[StepEvent, ...]]]:
        return Log, (tuple(self),)


AnyLog: TypeAlias = "Log | tuple[StepEvent, ...]"


def append(log: AnyLog, event: StepEvent) -> Log:
    """The log with one more event at its end.

    Args:
        log: a Log, or a tuple of StepEvents; `()` is the empty log.
        event: what ran.

    Returns:
        A new Log; `log` is unchanged.

    Guarantees:
        An event like the last but for its count is merged into it; a count of 0 adds nothing.
        `append(a + b, e) == a + append(b, e)`.
        Takes constant time, averaged over a log that grows, but for a second, different
        continuation of one log: that copies it.

    Raises:
        TypeError: event, or an entry of log, is not a StepEvent.
        ValueError: the counts of equal neighbours add up to more than 1e300.

    >>> event = StepEvent(noise_multiplier=1.0, sampling_prob=0.1)
    >>> append(append((), event), event)[0].count
    2
    """
    if not isinstance(log, Log):
        log = Log(log)
    if not isinstance(event, StepEvent):
        raise TypeError(
            f"Expected a log to hold StepEvents, got {event!r}. "
            "complete() a PartialEvent with the number first."
        )
    if event.count == 0:
        return log
    last, closed = log._last, log._closed
    if last is None:
        return _log(log._store, 0, event)
    if alike(last, event):
        return _log(log._store, closed, with_count(last, last.count + event.count))
    return _log(log._store.close(closed, last), closed + 1, event)


def _log(store: _Store, closed: int, last: StepEvent | None) -> Log:
    log = object.__new__(Log)
    log._store, log._closed, log._last = store, closed, last
    return log
