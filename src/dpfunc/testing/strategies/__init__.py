"""Hypothesis strategies: gradients and clipping rules, batches, logs, mechanisms, losses."""

from dpfunc.testing.strategies.batches import batches, masks
from dpfunc.testing.strategies.gradients import (
    DTYPES,
    ClippingCase,
    clip_norms,
    clipping_cases,
    per_sample_grads,
    shape_trees,
    shapes,
)
from dpfunc.testing.strategies.logs import deltas, events, logs
from dpfunc.testing.strategies.losses import LossCase, losses
from dpfunc.testing.strategies.mechanisms import mechanisms, queries, schedules
from dpfunc.testing.strategies.rules import RuleCase, clipping_rules, rule_cases

__all__ = [
    "DTYPES",
    "ClippingCase",
    "LossCase",
    "RuleCase",
    "batches",
    "clip_norms",
    "clipping_cases",
    "clipping_rules",
    "deltas",
    "events",
    "logs",
    "losses",
    "masks",
    "mechanisms",
    "per_sample_grads",
    "queries",
    "rule_cases",
    "schedules",
    "shape_trees",
    "shapes",
]
