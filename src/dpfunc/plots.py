"""Pictures of a run and of its privacy. matplotlib is an extra: `pip install dpfunc[plots]`.

Each function draws one file, whose ending says the format. What is drawn of a log is as public as the
log; what is drawn of gradients is PRIVATE, and says so in the picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from dpfunc import _checks
from dpfunc.accounting import calibrate_noise_multiplier, privacy_profile, remaining, trade_off
from dpfunc.accounting import epsilon as epsilon_of
from dpfunc.accounting.calibration import Fields
from dpfunc.accounting.steplog import between
from dpfunc.events import AnyLog, Log, append

_BLUE, _ORANGE, _GREY, _RED = "#1f5fa8", "#c8641b", "#666666", "#b00020"
_POINTS = 40
_Path = str | os.PathLike[str]


def draw_run(
    path: _Path,
    *,
    steps: Sequence[int],
    accuracy: Sequence[float],
    epsilon: Sequence[float],
    norms: ArrayLike,
    l2_clip_norm: float,
    title: str,
) -> None:
    """Draw accuracy and epsilon over the steps, and the norms before clipping, to a file.

    Args:
        path: of the picture; the ending says the format.
        steps, accuracy, epsilon: of equal length; accuracy in [0, 1] on held-out examples.
        norms: (n,) L2 norms of per-example gradients before clipping. PRIVATE: so is the picture.
        l2_clip_norm: where they are clipped, in gradient units.
        title: one line above.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(title, width=11)
    left, right = figure.subplots(1, 2)
    left.plot(steps, accuracy, color=_BLUE)
    left.set(xlabel="step", ylim=(0, 1))
    left.set_ylabel("validation accuracy", color=_BLUE)
    spent = left.twinx()
    spent.plot(steps, epsilon, color=_ORANGE, linestyle="--")
    spent.set_ylim(bottom=0)
    spent.set_ylabel("epsilon spent", color=_ORANGE)
    left.set_title("Utility and budget")
    _norms(right, norms, l2_clip_norm)
    figure.savefig(path, dpi=130)


def draw_norms(path: _Path, norms: ArrayLike, *, l2_clip_norm: float, title: str = "") -> None:
    """Draw the distribution of gradient norms before clipping. PRIVATE.

    Args:
        path: of the picture. PRIVATE, as it shows the norms.
        norms: (n,) L2 norms of per-example gradients; those that are not finite are left out.
        l2_clip_norm: where they are clipped, in gradient units, > 0.
        title: one line above.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: l2_clip_norm is not positive and finite.
    """
    l2_clip_norm = _checks.positive(l2_clip_norm=l2_clip_norm)
    figure = _figure(title)
    _norms(figure.subplots(), norms, l2_clip_norm)
    figure.savefig(path, dpi=130)


def draw_profile(path: _Path, log: AnyLog, *, title: str = "") -> None:
    """Draw the privacy profile of a log: bounds on delta over epsilon.

    Args:
        path: of the picture.
        log: what ran.
        title: one line above.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: as for `privacy_profile`.
    """
    figure = _figure(title)
    epsilons, lower, upper = privacy_profile(log)
    axes = figure.subplots()
    axes.plot(epsilons, upper, color=_BLUE, label="upper bound")
    axes.plot(epsilons, lower, color=_ORANGE, linestyle="--", label="lower bound")
    axes.set(xlabel="epsilon", ylabel="delta", yscale="log", ylim=(1e-12, 1.5))
    axes.set_xlim(left=0)
    _finish(axes, "upper right")
    figure.savefig(path, dpi=130)


def draw_trade_off(path: _Path, log: AnyLog, *, title: str = "") -> None:
    """Draw the errors that any membership attack must make, beside those of a blind guess.

    Args:
        path: of the picture.
        log: what ran.
        title: one line above.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: as for `trade_off`.
    """
    figure = _figure(title, width=5.2, height=4.8)
    wrong, missed = trade_off(log)
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0], color=_GREY, linestyle=":", label="no information")
    axes.plot(wrong, missed, color=_BLUE, label="no attack is below this")
    axes.fill_between(wrong, missed, color=_BLUE, alpha=0.12, linewidth=0)
    axes.set(xlabel="type I error: false positives", ylabel="type II error: false negatives")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _finish(axes, "upper right")
    figure.savefig(path, dpi=130)


def draw_budget(
    path: _Path,
    log: AnyLog,
    *,
    delta: float,
    target_epsilon: float | None = None,
    accountant: str = "pld",
    title: str = "",
) -> None:
    """Draw epsilon over the steps of a log, and where it would pass a budget if its last step went on.

    Args:
        path: of the picture.
        log: what ran, at least one step.
        delta: in (0, 1).
        target_epsilon: the budget, > 0; None draws none.
        accountant: as for `epsilon`.
        title: one line above.

    Guarantees:
        The last step within the budget is the last whose epsilon is at most target_epsilon.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: an empty log, or as for `remaining`.
    """
    log = Log(log)
    if not log:
        raise ValueError("Expected a log of at least one step, got an empty one.")
    figure, total = _figure(title), sum(event.count for event in log)
    end, last = total, None
    if target_epsilon is not None:
        last = _last_within(log, total, target_epsilon, delta, accountant)
        end = max(total, min(last + 1, 4 * total))
    extended = append(log, replace(log[-1], count=end - total))

    def spent(steps: list[int]) -> list[float]:
        logs = (between(extended, 0, step) for step in steps)
        return [epsilon_of(some, delta=delta, accountant=accountant) for some in logs]

    axes = figure.subplots()
    for start, stop, style, label in ((0, total, "-", "spent"), (total, end, "--", "to come")):
        if start < stop:
            steps = _steps(start, stop)
            axes.plot(steps, spent(steps), color=_BLUE, linestyle=style, label=label)
    if target_epsilon is not None and last is not None:
        axes.axhline(target_epsilon, color=_ORANGE, label=f"budget: epsilon {target_epsilon:g}")
        if last < end:
            axes.axvline(last, color=_GREY, linestyle=":", label=f"last step within it: {last}")
    axes.set(xlabel="steps", ylabel=f"epsilon at delta {delta:g}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _finish(axes, "best")
    figure.savefig(path, dpi=130)


def draw_planning(
    path: _Path,
    *,
    sampling_prob: float,
    num_steps: int,
    delta: float,
    epsilons: tuple[float, float] = (0.1, 10.0),
    accountant: str = "pld",
    title: str = "",
    **fields: Unpack[Fields],
) -> None:
    """Draw the noise multiplier that a run needs, over its target epsilon.

    Args:
        path: of the picture.
        sampling_prob: in (0, 1].
        num_steps: of the run, >= 1.
        delta: in (0, 1).
        epsilons: from which to which target, > 0.
        accountant: as for `epsilon`.
        title: one line above.
        fields: mechanism, sampling, relation and overflow_prob, as for StepEvent.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: as for `calibrate_noise_multiplier`.
    """
    figure = _figure(title)
    from matplotlib.ticker import LogLocator

    low, high = (_checks.positive(epsilons=value) for value in epsilons)
    targets = np.geomspace(low, high, _POINTS // 2)
    noises = [
        calibrate_noise_multiplier(
            target_epsilon=float(target),
            delta=delta,
            sampling_prob=sampling_prob,
            num_steps=num_steps,
            accountant=accountant,
            **fields,
        )
        for target in targets
    ]
    axes = figure.subplots()
    axes.plot(targets, noises, color=_BLUE)
    axes.set(xlabel=f"target epsilon at delta {delta:g}", ylabel="noise multiplier")
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    _finish(axes, None)
    figure.savefig(path, dpi=130)


def _figure(title: str, *, width: float = 6.4, height: float = 4.2) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected matplotlib to draw with, found none. Get it: pip install dpfunc[plots]"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def _finish(axes: Any, legend: str | None) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if legend is not None:
        axes.legend(loc=legend, framealpha=1.0)


def _norms(axes: Any, norms: ArrayLike, l2_clip_norm: float) -> None:
    values = np.asarray(norms, dtype=float)
    values = np.clip(values[np.isfinite(values)], l2_clip_norm * 1e-4, None)
    low, high = np.log10(min([*values, l2_clip_norm])), np.log10(max([*values, l2_clip_norm]))
    axes.hist(values, bins=np.logspace(low, high + 1e-6, 41), color=_GREY)
    axes.set_xscale("log")
    axes.axvline(l2_clip_norm, color=_ORANGE, linestyle="--", label=f"clip norm {l2_clip_norm:g}")
    axes.set(xlabel="gradient norm before clipping", ylabel="examples")
    axes.legend()
    axes.set_title("PRIVATE: not differentially private, do not release", color=_RED)


def _last_within(log: Log, total: int, target_epsilon: float, delta: float, accountant: str) -> int:
    """The last step with which epsilon is at most the target, if the log's last event goes on."""
    more = remaining(
        log, log[-1], target_epsilon=target_epsilon, delta=delta, accountant=accountant
    )
    if more or epsilon_of(log, delta=delta, accountant=accountant) <= target_epsilon:
        return total + more
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        within = epsilon_of(between(log, 0, middle), delta=delta, accountant=accountant)
        low, high = (middle, high) if within <= target_epsilon else (low, middle)
    return low


def _steps(start: int, stop: int) -> list[int]:
    """From start to stop, denser at the start, where epsilon bends."""
    return sorted({start + (stop - start) * i * i // _POINTS**2 for i in range(_POINTS + 1)})
