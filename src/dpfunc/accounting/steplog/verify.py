"""Whether a log file is whole, and if not, which line says so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpfunc.accounting.steplog.chain import LineError, lines_of
from dpfunc.accounting.steplog.fold import RunLog, runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found in a log file; true where nothing was wrong. `str()` says it in sentences."""

    path: str
    problem: str
    """What is wrong, "" where nothing is."""
    line: int
    """The first that fails, from 1; one beyond the last, where lines are missing; 0 where all is well."""
    num_lines: int
    """How many lines follow from each other, from the first on."""
    num_steps: int
    """How many steps they count, over all attempts."""
    num_attempts: int
    head: str
    """The hash of the last of them."""
    closed: bool

    def __bool__(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        attempts = "1 attempt" if self.num_attempts == 1 else f"{self.num_attempts} attempts"
        counted = f"{self.num_steps} steps in {attempts}"
        if not self:
            return (
                f"{self.path} FAILS at line {self.line}. {self.problem} "
                f"The lines before it count {counted}."
            )
        state = "closed" if self.closed else "open"
        return (
            f"{self.path} is whole: {self.num_lines} lines, {state}, as they were written. "
            f"They count {counted}. Head: {self.head}"
        )


def verify_log(path: str | os.PathLike[str], *, head: str | None = None) -> Verification:
    """Find out whether a log file is as it was written, from its first line to its last.

    Args:
        path: of the file.
        head: the hash of the last line, in hex, as a statement or a checkpoint holds it. Without it
            the file must be closed, since whole lines may be missing from the end of an open one.

    Returns:
        A Verification, true where all is well.

    Guarantees:
        In a closed file every changed byte, and every line that is removed, moved, repeated or put in
        front, is found, and the first line that fails is named.
        With `head`, any other content at all is found.

    NOT PROTECTED without `head`: the chain has no secret, so that whoever rewrites all lines from an
    edit on, or cuts a file that was closed twice after its first close, is not found.

    Raises:
        OSError: the file cannot be read.

    >>> import tempfile
    >>> from dpfunc.accounting import write_log
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_log(Path(folder) / "log", ())
    ...     bool(verify_log(Path(folder) / "log"))
    True
    """
    lines, torn = lines_of(Path(path).read_bytes())
    seen: list[RunLog] = []
    line, problem = 0, ""
    try:
        for run in runs(lines):
            seen.append(run)
    except LineError as error:
        line, problem = error.line, error.problem
    else:
        line, problem = _at_the_end(seen, torn, head)
    last = seen[-1] if seen else None
    attempts = last.attempts.values() if last else ()
    return Verification(
        path=str(path),
        problem=problem,
        line=line,
        num_lines=len(seen),
        num_steps=sum(attempt.stop - attempt.start for attempt in attempts),
        num_attempts=len(attempts),
        head=last.head if last else "",
        closed=last.closed if last else False,
    )


def _at_the_end(seen: list[RunLog], torn: bytes, head: str | None) -> tuple[int, str]:
    """The line and the problem of a file whose whole lines all follow from each other."""
    beyond, run = len(seen) + 1, seen[-1]
    if not run.head:
        return 1, "It is of format 1, whose lines have no hashes: nothing about it can be shown."
    if torn:
        return beyond, "It is cut off, in the middle of its last line."
    if head is None:
        return (0, "") if run.closed else (beyond, _OPEN)
    heads = [run.head for run in seen]
    if head == run.head:
        return 0, ""
    if head in heads:
        place = heads.index(head) + 1
        return place + 1, f"The expected head is that of line {place}; lines were added since."
    return beyond, "No line has the expected head: lines are missing, or it is another run's log."


_OPEN = "It is not closed: lines may be missing. The run goes on or was killed, or else the file was cut."
