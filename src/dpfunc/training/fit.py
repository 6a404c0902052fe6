"""`fit`: a whole run, with progress, evaluation, a budget, and files that survive a kill."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from dpfunc import _checks, random
from dpfunc.accounting import epsilon
from dpfunc.events import Log, append
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.sampling import poisson_batches
from dpfunc.step import TrainState
from dpfunc.training import fingerprint
from dpfunc.training.loop import train
from dpfunc.training.run import Run, Saving, open_run
from dpfunc.typing import Key, Params


class Fitted(NamedTuple):
    """Where a run has come to."""

    state: TrainState
    log: Log
    """Of all attempts."""
    epsilon: float
    stopped: str
    """"done", "budget" or "interrupted"."""
    history: list[dict[str, float]]
    """Step, epsilon and metrics wherever the run was evaluated. As public as evaluate makes it."""

    @property
    def params(self) -> Params:
        return self.state.params


def fit(
    train_step: tuple[Callable[..., TrainState], Callable[..., Any]],
    params: Params,
    data: Any,
    mechanism: DPSGD,
    key: Key | None = None,
    *,
    num_steps: int,
    delta: float,
    target_epsilon: float | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    saving: Saving | None = None,
    progress: bool = True,
    **batch_options: Any,
) -> Fitted:
    """Train for a number of steps, or as long as a budget lasts.

    Args:
        train_step: the pair of `make_train_step`; its step may be compiled.
        params: to begin with.
        data, batch_options: as for `poisson_batches`.
        mechanism: the record that train_step was made from.
        key: of the run. None: with saving, that of its folder, and else a fresh one.
        num_steps: length of the whole run, >= 0.
        delta: of the epsilon that is shown and kept to, in (0, 1).
        target_epsilon: the run stops before the step that would pass it. None: it does not.
        evaluate: state -> numbers to show and to keep, of held-out examples. What it returns is shown
            as it is, without noise: of training examples it would not be private.
        evaluate_every: steps between two evaluations; None: a hundredth of the run.
        saving: where the run is kept; None: nowhere.
        progress: whether to show a bar, with tqdm: epsilon, examples a second and metrics.

    Returns:
        A Fitted(state, log, epsilon, stopped, history), with `.params`.

    Guarantees:
        The log has each step's event before the step runs, and with saving the disk has it.
        A run that is killed at any moment and goes on ends with the same bits as one that was not, with
        a log that counts no less, and an epsilon that is not smaller.
        epsilon of all that was declared never passes target_epsilon.
        The bar shows nothing private: examples a second are expected ones, and no training loss.
        Ctrl-C ends the run after the step that is running; a second one at once.

    Raises:
        ValueError: the budget does not last for one step; a folder of another run, model or
            mechanism; numbers out of range.
        OSError: the folder cannot be written: nothing is released that the log does not count.
        MemoryError, RuntimeError: a batch does not fit; a note says what to do.
        ModuleNotFoundError: tqdm or safetensors is not installed (`pip install dpfunc[train]`).

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> import torch
    >>> from dpfunc import make_train_step, optimizers
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=4)
    >>> pair = make_train_step(lambda w, x: w @ x, mechanism, optimizers.sgd(0.1))
    >>> fitted = fit(
    ...     pair, torch.zeros(3), torch.ones(8, 3), mechanism, num_steps=100, delta=1e-5,
    ...     target_epsilon=10.0, progress=False)
    >>> fitted.stopped, fitted.epsilon <= 10.0
    ('budget', True)
    """
    check_mechanism(mechanism)
    num_steps = _checks.integer(at_least=0, num_steps=num_steps)
    delta = _checks.open_unit(delta=delta)
    if target_epsilon is not None:
        target_epsilon = _checks.non_negative(target_epsilon=target_epsilon)
    every = max(1, num_steps // 100) if evaluate_every is None else evaluate_every
    every = _checks.integer(at_least=1, evaluate_every=every)
    mechanism.check_covers(num_steps)
    init, step = train_step
    with ExitStack() as stack:
        if saving is None:
            run = Run(random.key() if key is None else key, init(params))
        else:
            made_of = {
                "batches": fingerprint.of_code(
                    {name: v for name, v in batch_options.items() if name != "num_workers"}
                )
            }
            opened = open_run(saving, init(params), step, data, mechanism, key, made_of)
            run = stack.enter_context(opened)
        interrupts = stack.enter_context(_interrupts())
        show = stack.enter_context(_bar(progress, num_steps, int(run.state.step), delta, mechanism))
        stopped = "done"
        while (begin := int(run.state.step)) < num_steps:
            most = min(begin + run.every, num_steps)
            end = _affordable(run, mechanism, begin, most, target_epsilon, delta)
            if end == begin:
                stopped = "budget"
                break
            run.declare(begin, [mechanism.event(t) for t in range(begin, end)])
            batches = poisson_batches(
                data, run.key, mechanism, num_steps=end, start=begin, **batch_options
            )
            with _advice_on_memory():
                for done in train(step, run.state, batches, run.key, mechanism):
                    run.after(done)
                    now = int(done.state.step)
                    if evaluate is not None and (now % every == 0 or now == num_steps):
                        run.evaluated(evaluate(done.state), epsilon(run.ran, delta=delta))
                    show(run)
                    if interrupts:
                        break
            run.checkpoint()
            if interrupts:
                stopped = "interrupted"
                break
        if stopped == "budget" and not run.log:
            raise ValueError(
                f"Expected target_epsilon={target_epsilon} to last for one step at least, got a first step "
                f"that costs {epsilon((mechanism.event(0),), delta=delta):.6g} at {delta=}. "
                "Use more noise, or a smaller sampling_prob."
            )
        if stopped != "interrupted":
            run.close()
    return Fitted(run.state, run.log, epsilon(run.log, delta=delta), stopped, run.history)


def _affordable(
    run: Run,
    mechanism: DPSGD,
    begin: int,
    most: int,
    target_epsilon: float | None,
    delta: float,
) -> int:
    """The last step, at most `most`, up to which the run may go. What is declared is paid for."""
    if target_epsilon is None:
        return most
    logs = {max(begin, min(run.declared, most)): run.log}
    (paid,) = logs
    log = run.log
    for step in range(paid, most):
        log = append(log, mechanism.event(step))
        logs[step + 1] = log
    if epsilon(log, delta=delta) <= target_epsilon or paid == most:
        return most
    fits, fails = paid, most
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if epsilon(logs[middle], delta=delta) <= target_epsilon:
            fits = middle
        else:
            fails = middle
    return fits


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C puts its signal into; a second Ctrl-C interrupts as ever."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _advice_on_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            error.add_note(
                "If a batch does not fit: make_train_step(..., chunk_size=32) bounds the memory of gradients and "
                "changes nothing else. The log counts the steps that were declared; the run can go on."
            )
        raise


@contextmanager
def _bar(
    progress: bool, num_steps: int, start: int, delta: float, mechanism: DPSGD
) -> Iterator[Callable[[Run], None]]:
    """What shows a run after each step; the epsilon, which takes milliseconds, twice a second."""
    if not progress:
        yield lambda run: None
        return
    from tqdm import tqdm

    with tqdm(total=num_steps, initial=start, unit="step") as bar:
        shown = -1.0

        def show(run: Run) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown > 0.5 or bar.n + 1 == num_steps:
                shown = now
                rate = (bar.n + 1 - start) / max(bar.format_dict["elapsed"], 1e-9)
                words = [
                    f"epsilon {epsilon(run.ran, delta=delta):.4g}",
                    f"{rate * mechanism.expected_batch_size:.4g} examples/s",
                    *(f"{name} {value:.4g}" for name, value in run.metrics.items()),
                ]
                bar.set_postfix_str(", ".join(words), refresh=False)
            bar.update()

        yield show
