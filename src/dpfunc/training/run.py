"""A run and its files. The order of what reaches the disk is the guarantee.

With n steps between checkpoints:

1. a checkpoint of step s, which says what the run is made of;
2. the log: steps s to s + n - 1 of this attempt may release these events;
3. the steps run;
4. a checkpoint of step s + n, and so on.

A kill anywhere leaves a checkpoint whose later steps, as far as they ran, are in the log. The run
goes on from it. If all that it is made of is the same, the steps after the checkpoint are the very
same releases, bit for bit, and count once. Otherwise they would be other releases under the same noise:
that is refused, or made another attempt, whose random number is folded into the key, and both are counted.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from dpfunc import _checks, random, trees
from dpfunc.accounting import Header, LogFile
from dpfunc.accounting.steplog import between
from dpfunc.events import Log, StepEvent, append
from dpfunc.mechanism import DPSGD
from dpfunc.step import TrainState
from dpfunc.training import fingerprint
from dpfunc.training.checkpoint import load_checkpoint, save_checkpoint
from dpfunc.training.keyfile import read_key, write_key
from dpfunc.training.loop import Trained
from dpfunc.typing import Key

LOG, CHECKPOINT, KEY = "log.jsonl", "checkpoint.safetensors", "key.SECRET"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Where a run is kept, and how often.

    Args:
        folder: of log.jsonl (public), checkpoint.safetensors (what was released, and so public, but
            for the history, which is as public as evaluate makes it) and key.SECRET (mode 0600). It is
            made where there is none; a run in it goes on.
        every: steps between checkpoints, >= 1: what a kill costs in time; and in privacy too, where
            the run then goes on under a new attempt.
        unit: what one example is, for the log's header.
        note: free text for the log's header. PUBLIC. A run goes on under the note it began with.
        allow_changes: where code, data, mechanism or machine are no longer those of the checkpoint, go
            on under a new attempt number, and not with an error. Steps that the log has declared
            beyond the checkpoint stay counted.

    Raises:
        ValueError, TypeError: every is no whole number >= 1.
    """

    folder: str | PathLike[str]
    every: int = 100
    unit: str = "example"
    note: str = ""
    allow_changes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        _checks.integer(at_least=1, every=self.every)


class Run:
    """Where a run is: its state, what ran, what was declared; kept in memory alone."""

    def __init__(self, key: Key, state: TrainState, every: int = 100) -> None:
        self.key, self.state, self.every = key, state, every
        self.ran = Log()
        """What has run, of all attempts; in this one as far as the state."""
        self.log = Log()
        """What may have been released: all that was declared."""
        self.declared = int(state.step)
        """The first step of this attempt that was not declared."""
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def declare(self, begin: int, events: list[StepEvent]) -> None:
        """Declare steps before they run."""
        new = events[max(0, self.declared - begin) :]
        self.log = self.log + new
        self.declared = max(self.declared, begin + len(events))

    def after(self, done: Trained) -> None:
        """A step has run."""
        self.state, self.ran = done.state, append(self.ran, done.event)
        self.metrics = {**self.metrics, **done.metrics}

    def evaluated(self, metrics: dict[str, float], epsilon: float) -> None:
        self.metrics = {**self.metrics, **{name: float(v) for name, v in metrics.items()}}
        row = {"step": int(self.state.step), "epsilon": epsilon, **self.metrics}
        self.history.append(row)

    def checkpoint(self) -> None:
        """What was declared and has not run never will, in memory."""
        self.log, self.declared = self.ran, int(self.state.step)

    def close(self) -> None:
        """The run is complete."""


class SavedRun(Run):
    """A run whose declarations and checkpoints are on disk when the calls return."""

    def __init__(
        self,
        key: Key,
        state: TrainState,
        saving: Saving,
        file: LogFile,
        attempt: int,
        about: dict[str, Any],
        history: list[dict[str, float]],
        code: Callable[[], str],
    ) -> None:
        super().__init__(key if attempt == 0 else random.fold_in(key, attempt), state, saving.every)
        self.code, self.code_at_start = code, code()
        self.file, self.attempt, self.about = file, attempt, about
        self.path = Path(saving.folder) / CHECKPOINT
        self.history = history
        last = history[-1] if history else {}
        self.metrics = {n: v for n, v in last.items() if n not in ("step", "epsilon")}
        self._read()
        others = [a.log for number, a in file.run.attempts.items() if number != attempt]
        mine = file.run.attempts.get(attempt)
        self.ran = sum(others, Log())
        if mine is not None:
            self.ran = self.ran + between(mine.log, 0, int(state.step) - mine.start)

    def declare(self, begin: int, events: list[StepEvent]) -> None:
        if begin + len(events) > self.declared or self.attempt not in self.file.run.attempts:
            self.file.intend(Log(events), attempt=self.attempt, start=begin)
            self._read()

    def checkpoint(self) -> None:
        step = int(self.state.step)
        if self.code() != self.code_at_start:
            raise RuntimeError(
                "Expected a step that stays what it is while the run goes on, got one that something changed: "
                "does evaluate leave a module in .eval(), or does the loss count its calls? The run could not "
                "be repeated from here. The last checkpoint and the log stand."
            )
        if step < self.declared:
            self.file.stop(step, attempt=self.attempt)
            self._read()
        about = {**self.about, "attempt": self.attempt, "step": step, "head": self.file.head}
        save_checkpoint(self.path, self.state, about=about | {"history": self.history})

    def close(self) -> None:
        self.file.close()

    def _read(self) -> None:
        mine = self.file.run.attempts.get(self.attempt)
        self.log = self.file.run.log
        self.declared = int(self.state.step) if mine is None else mine.stop


@contextmanager
def open_run(
    saving: Saving,
    state: TrainState,
    step: Callable[..., Any],
    data: Any,
    mechanism: DPSGD,
    key: Key | None,
    made_of: dict[str, str],
) -> Iterator[SavedRun]:
    """Begin the run of a folder, or go on with it."""
    folder = Path(saving.folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / CHECKPOINT).exists()
    key = _key_of(folder, key, begun)
    _check_randomness(step)
    about = {
        "mechanism": _in_words(mechanism),
        "code": fingerprint.keyed(fingerprint.of_code(step, mechanism), key),
        "data": fingerprint.keyed(fingerprint.of_data(data), key),
        **{name: fingerprint.keyed(own, key) for name, own in made_of.items()},
        **fingerprint.of_machine(trees.leaves(state.params)[0].device),
    }
    attempt, head, history = 0, None, []
    if begun:
        state, before = load_checkpoint(folder / CHECKPOINT, state)
        attempt, head, history = (before.pop(name) for name in ("attempt", "head", "history"))
        del before["step"]
        changed = _differences(before, about)
        if changed and not saving.allow_changes:
            raise ValueError(
                f"Expected to go on with the run in {folder} as it was begun, but changed: {changed}. To run its "
                "steps again in any other way would give their noise away. Go on with "
                "Saving(allow_changes=True): a new attempt, with noise of its own, and both counted."
            )
        if changed:
            attempt = 1 + secrets.randbelow(2**63 - 1)
    # Events agree in all that a header says, whatever the schedules.
    header = Header.of((mechanism.event(0),), unit=saving.unit, note=saving.note)
    with LogFile(folder / LOG, header=header, extends=head) as file:
        if not begun and file.run.log:
            raise ValueError(
                f"Expected {folder} to hold {CHECKPOINT} beside a log that counts steps, found none. What ran "
                "cannot be run again: begin in another folder, and count this log too."
            )
        code = partial(fingerprint.of_code, step, mechanism)
        run = SavedRun(key, state, saving, file, attempt, about, history, code)
        if run.attempt not in file.run.attempts:
            run.checkpoint()  # what the attempt is made of, before anything of it is declared
        yield run


def _key_of(folder: Path, key: Key | None, begun: bool) -> Key:
    path = folder / KEY
    if not path.exists():
        if begun:
            raise FileNotFoundError(
                f"Expected {path}, without which the run cannot go on, found none."
            )
        key = random.key() if key is None else key
        write_key(path, key)
    stored = read_key(path)
    if key is not None and not stored.equal(key.cpu().to(stored.dtype)):
        raise ValueError(
            f"Expected the key of the run, which is in {path}, got another. Pass key=None to go on."
        )
    return stored if key is None else key


def _check_randomness(step: Any) -> None:
    step = getattr(step, "_torchdynamo_orig_callable", step)
    if getattr(step, "randomness", "error") != "error":
        raise ValueError(
            "Expected a saved run to draw nothing from torch's global generator (randomness='error'), got "
            f"randomness={step.randomness!r}: its steps could not be repeated. Use a loss with a key (has_key=True)."
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is no longer the same, in words; fingerprints by their name alone."""
    said = [
        name
        if name in ("code", "data", "batches")
        else f"{name} was {was!r:.200} and is {is_!r:.200}"
        for name in sorted({*before, *now})
        if (was := before.get(name)) != (is_ := now.get(name))
    ]
    return "; ".join(said)


def _in_words(mechanism: DPSGD) -> dict[str, str]:
    """What a person compares; what differs within functions shows in the code's fingerprint."""
    return {
        field.name: re.sub(r" at 0x[0-9a-f]+", "", repr(getattr(mechanism, field.name)))
        for field in fields(mechanism)
    }
