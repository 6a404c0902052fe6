"""Per-sample gradients, and the sum of them after each is clipped."""

from dpfunc.gradients.clipped import clipped_grad
from dpfunc.gradients.clipping import Clipped, ClippedWithAux, FlatClipping, clip_and_sum
from dpfunc.gradients.explain import Explanation, explain
from dpfunc.gradients.layers import register_rule
from dpfunc.gradients.per_sample import per_sample_grads

__all__ = [
    "Clipped",
    "ClippedWithAux",
    "Explanation",
    "FlatClipping",
    "clip_and_sum",
    "clipped_grad",
    "explain",
    "per_sample_grads",
    "register_rule",
]
