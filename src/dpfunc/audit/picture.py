"""The picture of an audit. matplotlib is an extra: `pip install dpfunc[train]`."""

from __future__ import annotations

import os

import numpy as np

from dpfunc.audit.families import noise_family
from dpfunc.audit.report import AuditReport

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8641b", "#666666"


def draw_audit(path: str | os.PathLike[str], report: AuditReport) -> None:
    """Draw the scores, the errors of the attack against those that the claim allows, and both epsilons.

    Args:
        path: of the picture; the ending says the format.
        report: of `audit_step`. PRIVATE where the data are: so is the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))

    low, high = np.quantile(report.scores, [0.001, 0.999])
    bins = np.linspace(low, max(high, low + 1e-9), 61)
    for scores, color, label in (
        (report.scores_out, _GREY, "out"),
        (report.scores_in, _ORANGE, "in"),
    ):
        left.hist(scores, bins=bins, color=color, alpha=0.6, density=True, label=label)  # pyright: ignore
    left.set(xlabel="score", ylabel="density", title="Canaries")
    left.legend()

    thresholds = np.quantile(report.scores, np.linspace(0, 1, 201))
    missed = np.searchsorted(np.sort(report.scores_in), thresholds, side="right")
    passed = np.searchsorted(np.sort(report.scores_out), thresholds, side="right")
    middle.plot(
        1 - passed / max(1, report.scores_out.size),
        missed / max(1, report.scores_in.size),
        color=_BLUE,
        label="the attack",
    )
    rates = np.linspace(0, 1, 201)
    points = noise_family(report.log).points(1.0)
    with np.errstate(over="ignore"):
        slopes = np.minimum(np.exp(points.epsilons), 1e300)[:, None]
    below = 1 - points.deltas[:, None] - slopes * rates
    mirrored = (1 - points.deltas[:, None] - rates) / slopes
    allowed = np.maximum(np.maximum(below, mirrored).max(0), 0.0)
    middle.fill_between(rates, allowed, color=_ORANGE, alpha=0.25, label="the claim forbids")
    middle.set(xlabel="false positive rate", ylabel="false negative rate", title="Trade-off")
    middle.legend()

    right.bar(
        [f"lower bound\n({report.confidence:.0%})", "accounted"],
        [report.lower, report.epsilon],
        color=[_BLUE, _ORANGE],
    )
    right.set(ylabel=f"epsilon at delta {report.delta:g}")
    right.set_title("REFUTED" if report.refuted else "consistent")
    figure.savefig(path, dpi=130)
