"""Per-sample gradients, and the sum of them after each is clipped."""

from dpfunc.gradients.clipped import clipped_grad, clipped_sums
from dpfunc.gradients.clipping import Clipped, ClippedWithAux, as_rule, clip_and_sum, sum_by
from dpfunc.gradients.explain import Explanation, explain
from dpfunc.gradients.layers import register_rule
from dpfunc.gradients.observe import Observation, observe
from dpfunc.gradients.per_sample import per_sample_grads
from dpfunc.gradients.rules import (
    AutomaticClipping,
    CustomClipping,
    FlatClipping,
    L1Clipping,
    PerGroupClipping,
    PerSampleAdaptiveClipping,
    Rescaled,
)

__all__ = [
    "AutomaticClipping",
    "Clipped",
    "ClippedWithAux",
    "CustomClipping",
    "Explanation",
    "FlatClipping",
    "L1Clipping",
    "Observation",
    "PerGroupClipping",
    "PerSampleAdaptiveClipping",
    "Rescaled",
    "as_rule",
    "clip_and_sum",
    "clipped_grad",
    "clipped_sums",
    "explain",
    "observe",
    "per_sample_grads",
    "register_rule",
    "sum_by",
]
