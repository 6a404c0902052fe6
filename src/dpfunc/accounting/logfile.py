"""The log on disk, whole: written at once, read, and read with all that its file says."""

from __future__ import annotations

import os
from collections import deque
from itertools import islice
from pathlib import Path

from dpfunc.accounting.steplog.chain import LineError, chained, lines_of
from dpfunc.accounting.steplog.disk import replace_file as replace_file
from dpfunc.accounting.steplog.entries import Header, header_to_json
from dpfunc.accounting.steplog.fold import RunLog, runs, steps_entry
from dpfunc.events import AnyLog, Log

_RUNS_A_LINE = 10_000


def write_log(
    path: str | os.PathLike[str], log: AnyLog, *, unit: str = "example", note: str = ""
) -> None:
    """Write a log, whole or not at all: the closed file of a run of one attempt.

    Args:
        path: of the file; replaced where it exists.
        log: what ran.
        unit, note: as for `Header`. PUBLIC.

    Guarantees:
        `read_log(path) == log`, and `verify_log(path)` finds nothing.
        A kill leaves the old file or the new one. No key is in it.

    Raises:
        OSError: the folder does not exist or cannot be written.
        TypeError: a unit or note that is not text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_log(Path(folder) / "log", ())
    ...     read_log(Path(folder) / "log")
    Log([])
    """
    log = Log(log)
    header = Header.of(log, unit=unit, note=note)
    entries, start, events = [header_to_json(header)], 0, iter(log)
    while some := Log(islice(events, _RUNS_A_LINE)):
        entries.append(steps_entry(header, 0, start, some))
        start += sum(event.count for event in some)
    lines, head = [], ""
    for entry in [*entries, {"closed": True}]:
        line, head = chained(entry, head)
        lines.append(line)
    replace_file(path, b"".join(lines))


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read what ran: the events of all attempts in a log file.

    Args:
        path: of the file, open or closed, of any format.

    Returns:
        The log. A file from before a field was added reads as one with that field's default.

    Guarantees:
        Of a file that is being written, or whose writer was killed, it is at least what was released.

    Raises:
        ValueError: a newer format, an unknown field, a missing one that every version writes, a
            line that was edited, moved or removed; it names the line.
        OSError: the file cannot be read.

    >>> import tempfile
    >>> from dpfunc.events import StepEvent
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_log(Path(folder) / "log", (StepEvent(noise_multiplier=1.0, sampling_prob=0.1),))
    ...     len(read_log(Path(folder) / "log"))
    1
    """
    return read_run(path).log


def read_run(path: str | os.PathLike[str]) -> RunLog:
    """Read all that a log file says: header, attempts, and whether it is closed.

    Args:
        path: of the file, open or closed, of any format.

    Returns:
        RunLog(header, attempts, head, closed), whose `log` is what ran.

    Guarantees:
        Half a line at the end, which a killed writer leaves, is passed over: nothing ran under it.

    Raises:
        ValueError, OSError: as for `read_log`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_log(Path(folder) / "log", (), unit="user")
    ...     read_run(Path(folder) / "log").header.unit
    'user'
    """
    lines, torn = lines_of(Path(path).read_bytes())
    try:
        run = deque(runs(lines), maxlen=1).pop()
    except LineError as error:
        raise ValueError(f"{path}, {error}") from error
    if torn and not run.head:
        raise ValueError(f"Expected {path} to end with a whole line; it is cut off.")
    return run
