"""Optimizers as (init, update) pairs of pure functions over pytrees.

What they read is already released, so nothing here can cost privacy: it is all post-processing.
"""

from dpfunc.optimizers.adam import AdamState, adam, adam_bc, adamw
from dpfunc.optimizers.averages import (
    AveragedState,
    DiSKState,
    EMAState,
    averaged,
    disk,
    disk_params,
    ema,
)
from dpfunc.optimizers.bridges import from_torchopt, write_grads
from dpfunc.optimizers.pair import Optimizer, apply_updates, chain
from dpfunc.optimizers.rates import (
    LearningRate,
    constant,
    cosine_decay,
    exponential_decay,
    step_decay,
)
from dpfunc.optimizers.sgd import SGDState, sgd

__all__ = [
    "AdamState",
    "AveragedState",
    "DiSKState",
    "EMAState",
    "LearningRate",
    "Optimizer",
    "SGDState",
    "adam",
    "adam_bc",
    "adamw",
    "apply_updates",
    "averaged",
    "chain",
    "constant",
    "cosine_decay",
    "disk",
    "disk_params",
    "ema",
    "exponential_decay",
    "from_torchopt",
    "sgd",
    "step_decay",
    "write_grads",
]
