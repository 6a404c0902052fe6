"""The write-ahead log: what steps may release is on disk before they run.

So whenever a run is killed, its log counts at least the steps that it released.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, final

from dpfunc.accounting.steplog import disk
from dpfunc.accounting.steplog.chain import LineError, chained, lines_of
from dpfunc.accounting.steplog.entries import Header, header_to_json
from dpfunc.accounting.steplog.fold import (
    Attempts,
    RunLog,
    declared,
    runs,
    steps_entry,
    stopped,
)
from dpfunc.events import AnyLog, Log


@final
class LogFile:
    """A log file that is added to, by one writer at a time. Use it in a `with`, which lets go of it.

    Args:
        path: of the file; it is made where there is none, and goes on where there is one, also if it
            was closed.
        header: of a new file; one that exists must have the same. None takes what is there.
        extends: a head that the file must have had, as a checkpoint holds it: it shows that lines
            were lost since.

    Guarantees:
        `intend` and `stop` return when their line is on disk (fsync; its drive may promise more than
        it holds), or raise with the file as it was. A process killed at any moment leaves a file that
        counts all steps whose `intend` returned; half a line at its end is cut off when it is opened.
        Two writers at once are refused where the system has locks. No key is in it. Mode 0644.

    Raises:
        ValueError: a file that is no log or of format 1, was edited, has another header, or does not
            extend `extends`.
        OSError: no folder, no room, no permission, or another writer.

    >>> import tempfile
    >>> from dpfunc.events import StepEvent
    >>> step = StepEvent(noise_multiplier=1.0, sampling_prob=0.01)
    >>> with tempfile.TemporaryDirectory() as folder, LogFile(Path(folder) / "log") as file:
    ...     file.intend((step,) * 100, attempt=0, start=0)  # then steps 0 to 99 may run
    ...     file.stop(60, attempt=0)  # but those from 60 on did not
    ...     file.run.log[0].count
    60
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        header: Header | None = None,
        extends: str | None = None,
    ) -> None:
        self._path = Path(path)
        if extends is not None and not self._path.exists():
            raise FileNotFoundError(f"Expected a log at {path}, which {extends} is of, found none.")
        self._file = disk.open_alone(self._path)
        try:
            self._open(header, extends)
        except BaseException:
            self._file.close()
            raise

    def intend(self, log: AnyLog, *, attempt: int, start: int) -> None:
        """Declare that the steps from `start` on may release these events. Run them when this returns.

        Args:
            log: the events of the steps start, start + 1, ...; to declare none writes nothing.
            attempt: in [0, 2**63): 0 for the first run, a fresh random number for one that does
                anything differently.
            start: the first of them: at most one beyond the last that is declared.

        Raises:
            ValueError, TypeError: a gap; a step declared again with another event; an event that
                the header does not agree with.
            OSError: it could not be written; the file is as it was.
        """
        log = Log(log)
        self._run.header.check(log)
        attempts = declared(self._run.attempts, attempt, start, log)
        if attempt in self._run.attempts and start < self._run.attempts[attempt].stop:
            self._kept[attempt] = self._run.attempts[attempt].stop
        if log:
            self._append(steps_entry(self._run.header, attempt, start, log), attempts)

    def stop(self, step: int, *, attempt: int) -> None:
        """Declare that no step of this attempt at or beyond `step` was released by this writer.

        What an earlier writer declared stays counted, and so does what was declared before a replay:
        whoever was killed at that may have released more than the one who replays it.

        Raises:
            ValueError, TypeError: a step beyond those declared, or an unknown attempt.
            OSError: it could not be written; the file is as it was.
        """
        stopped(self._run.attempts, attempt, step)
        step = max(step, self._kept.get(attempt, 0))
        if step < self._run.attempts[attempt].stop:
            attempts = stopped(self._run.attempts, attempt, step)
            self._append({"attempt": attempt, "stop": step}, attempts)

    def close(self) -> None:
        """Declare the run complete, and let go of the file."""
        if not self._run.closed:
            self._append({"closed": True}, self._run.attempts)
        self._file.close()

    @property
    def head(self) -> str:
        """The hash of the last line, in hex, which fixes all of the file."""
        return self._run.head

    @property
    def run(self) -> RunLog:
        """What the file says."""
        return self._run

    def __enter__(self) -> LogFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __repr__(self) -> str:
        return f"LogFile({str(self._path)!r})"

    def _open(self, header: Header | None, extends: str | None) -> None:
        content = self._file.readall()
        first, _ = chained(header_to_json(header or Header()), "")
        if len(content) < len(first) and first.startswith(content):  # new, or torn as it was made
            disk.cut(self._file, 0)
            disk.write_at(self._file, 0, first)
            disk.sync_folder(self._path.parent)
            content = first
        lines, torn = lines_of(content)
        try:
            *_, self._run = found = list(runs(lines))
        except LineError as error:
            raise ValueError(f"{self._path}, {error}") from error
        self._size = len(content) - len(torn)
        self._kept = {number: attempt.stop for number, attempt in self._run.attempts.items()}
        self._check(header, extends, {run.head for run in found})
        if torn:
            disk.cut(self._file, self._size)

    def _check(self, header: Header | None, extends: str | None, heads: set[str]) -> None:
        if not self.head:
            raise ValueError(
                f"Expected {self._path} to be of format 2, got format 1, which is not added to. "
                "Read it, and write it to a new file."
            )
        if header is not None and header != self._run.header:
            raise ValueError(
                f"Expected {self._path} to have the header {header}, got {self._run.header}. "
                "It is the log of another run."
            )
        if extends is not None and extends not in heads:
            raise ValueError(
                f"Expected a line of {self._path} with SHA-256 {extends}, found none. "
                "Lines were lost since, or it is the log of another run."
            )

    def _append(self, entry: dict[str, Any], attempts: Attempts) -> None:
        line, head = chained(entry, self.head)
        disk.check_size(self._file, self._size)
        # What the file is to say is noted before it does, and taken back with the line, so that an
        # interrupt finds the two agreeing wherever it comes.
        before = self._run, self._size
        try:
            self._run = RunLog(self._run.header, attempts, head, closed="closed" in entry)
            self._size += len(line)
            disk.write_at(self._file, before[1], line)
        except BaseException:
            self._run, self._size = before
            disk.cut(self._file, self._size)
            raise
