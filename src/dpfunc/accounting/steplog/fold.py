"""From lines to what ran: every attempt's steps in order, the attempts in order of appearance.

A step is known by (attempt, step). To declare it again is an exact replay, which counts once and must
say the same; whatever is run differently takes a new attempt number, and is counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

from dpfunc import _checks
from dpfunc.accounting.steplog import chain
from dpfunc.accounting.steplog.chain import LineError
from dpfunc.accounting.steplog.entries import (
    FORMATS,
    Header,
    event_from_json,
    event_to_json,
    header_from_json,
)
from dpfunc.events import Log, StepEvent, append


class Attempt(NamedTuple):
    """The steps start to stop - 1 of an attempt, and their events."""

    start: int
    stop: int
    log: Log


Attempts = dict[int, Attempt]


class RunLog(NamedTuple):
    """What a log file says.

    `attempts` has their numbers in order of appearance; the next step of attempt a is
    `attempts[a].stop`. `head` is the hash of the last line, in hex, "" in a file of format 1.
    `closed` says that the run is complete: no line is missing at the end of the file.
    """

    header: Header
    attempts: Attempts
    head: str
    closed: bool

    @property
    def log(self) -> Log:
        """All that may have been released: the attempts' logs, one after the other."""
        return sum((attempt.log for attempt in self.attempts.values()), Log())


def declared(attempts: Attempts, number: int, start: int, events: Sequence[StepEvent]) -> Attempts:
    """The attempts when steps `start`, `start + 1`, ... of attempt `number` may have released these."""
    number, start = _attempt(number), _checks.integer(at_least=0, start=start)
    stop = start + sum(event.count for event in events)
    if number not in attempts:
        if number == 0 and start > 0:
            raise ValueError(f"Expected attempt 0 to begin at start=0, got {start}.")
        return {**attempts, number: Attempt(start, stop, Log(events))}
    first, last, known = attempts[number]
    if not first <= start <= last:
        raise ValueError(
            f"Expected {first} <= start <= {last} in attempt {number}, got {start}. "
            f"{'Steps in between are declared by no line.' if start > last else 'It began later.'}"
        )
    if again := min(stop, last) - start:
        before, now = (
            between(known, start - first, start - first + again),
            between(events, 0, again),
        )
        if before != now:
            raise ValueError(
                f"Expected steps {start} to {start + again - 1} of attempt {number} to release what they "
                f"were first declared with, {str(tuple(before))[:200]}, got {str(tuple(now))[:200]}. "
                "What runs differently takes a new attempt number."
            )
        events = between(events, again, stop - start)
    return {**attempts, number: Attempt(first, max(stop, last), reduce(append, events, known))}


def stopped(attempts: Attempts, number: int, stop: int) -> Attempts:
    """The attempts when no step of attempt `number` at or beyond `stop` was released."""
    number, stop = _attempt(number), _checks.integer(at_least=0, stop=stop)
    if number not in attempts:
        raise ValueError(f"Expected an attempt that was declared, got {number}.")
    first, last, log = attempts[number]
    if not first <= stop <= last:
        raise ValueError(
            f"Expected {first} <= stop <= {last} in attempt {number}, got {stop}. "
            "To stop says which of the declared steps were not run."
        )
    kept = log if stop == last else between(log, 0, stop - first)
    return {**attempts, number: Attempt(first, stop, kept)}


def between(events: Iterable[StepEvent], start: int, stop: int) -> Log:
    """The events of the steps start to stop - 1 of a log, counted from its own first."""
    chosen: list[StepEvent] = []
    end = 0
    for event in events:
        begin, end = end, end + event.count
        if (count := min(end, stop) - max(begin, start)) > 0:
            chosen.append(event if count == event.count else replace(event, count=count))
        if end >= stop:
            break
    return Log(chosen)


def steps_entry(header: Header, number: int, start: int, log: Log) -> dict[str, Any]:
    events = [event_to_json(event, header.shared) for event in log]
    return {"attempt": number, "start": start, "events": events}


def runs(lines: list[bytes]) -> Iterator[RunLog]:
    """What a file says after its first line, after its second, and so on.

    Raises:
        LineError: at the first line that fails.
    """
    if _version(lines) == 1:
        yield from _runs_of_format_1(lines)
        return
    header, attempts = Header(), Attempts()
    for number, (entry, head) in enumerate(chain.unchained(lines), 1):
        try:
            if number == 1:
                header = header_from_json(entry)
            else:
                attempts = _after(attempts, entry, header)
        except (ValueError, TypeError) as error:
            raise LineError(number, error) from error
        yield RunLog(header, attempts, head, closed=number > 1 and "closed" in entry)


def _version(lines: list[bytes]) -> int:
    first = chain.parsed(lines[0], 1) if lines else None
    version = first.get("dpfunc_log") if isinstance(first, dict) else None
    if type(version) is not int or version < min(FORMATS):
        raise LineError(
            1, f'Expected a log to begin with {{"dpfunc_log": 2, ..., got {lines[:1]!r:.80}.'
        )
    if version not in FORMATS:
        raise LineError(
            1, f"Expected format {max(FORMATS)} or before, got {version}. A newer dpfunc reads it."
        )
    return version


def _runs_of_format_1(lines: list[bytes]) -> Iterator[RunLog]:
    """One event a line; no attempts, no chain, and no sign that it is whole."""
    header, stop, log = Header(), 0, Log()
    yield RunLog(header, {0: Attempt(0, stop, log)}, "", closed=False)
    for number, line in enumerate(lines[1:], 2):
        entry = chain.parsed(line, number)
        try:
            event = event_from_json(entry, {})
        except (ValueError, TypeError) as error:
            raise LineError(number, error) from error
        stop, log = stop + event.count, append(log, event)
        yield RunLog(header, {0: Attempt(0, stop, log)}, "", closed=False)


def _after(attempts: Attempts, entry: Any, header: Header) -> Attempts:
    match entry:
        case {"attempt": number, "start": start, "events": [*events], **rest} if not rest:
            shared = header.shared
            return declared(attempts, number, start, [event_from_json(e, shared) for e in events])
        case {"attempt": number, "stop": stop, **rest} if not rest:
            return stopped(attempts, number, stop)
        case {"closed": True, **rest} if not rest:
            return attempts
    raise ValueError(f"Expected steps, a stop or the end of a run, got {str(entry)[:200]}.")


def _attempt(number: int) -> int:
    number = _checks.integer(at_least=0, attempt=number)
    if number >= 2**63:
        raise ValueError(f"Expected attempt < 2**63, got {number}.")
    return number
