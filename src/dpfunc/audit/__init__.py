"""Empirical lower bounds on epsilon: canaries, scores, estimators, and the audit of a step."""

from dpfunc.audit.canaries import (
    Canaries,
    Marked,
    blank,
    every_leaf,
    example_canaries,
    gradient_canaries,
    marked_loss,
    mislabelled,
    quiet_coordinates,
)
from dpfunc.audit.estimators import accuracy_bound, clopper_pearson, gaussian_fit, independent_runs
from dpfunc.audit.families import (
    Family,
    Points,
    approximate_family,
    gaussian_family,
    noise_family,
)
from dpfunc.audit.onerun import one_run, one_run_curve, one_run_p_value, one_run_refutes
from dpfunc.audit.picture import draw_audit
from dpfunc.audit.replicas import Observations
from dpfunc.audit.report import ESTIMATORS, AuditReport, audit_step
from dpfunc.audit.scores import (
    gradient_score,
    largest_score,
    likelihood_ratio,
    loss_score,
    spread_score,
)

__all__ = [
    "ESTIMATORS",
    "AuditReport",
    "Canaries",
    "Family",
    "Marked",
    "Observations",
    "Points",
    "accuracy_bound",
    "approximate_family",
    "audit_step",
    "blank",
    "clopper_pearson",
    "draw_audit",
    "every_leaf",
    "example_canaries",
    "gaussian_family",
    "gaussian_fit",
    "gradient_canaries",
    "gradient_score",
    "independent_runs",
    "largest_score",
    "likelihood_ratio",
    "loss_score",
    "marked_loss",
    "mislabelled",
    "noise_family",
    "one_run",
    "one_run_curve",
    "one_run_p_value",
    "one_run_refutes",
    "quiet_coordinates",
    "spread_score",
]
