"""Differentially private deep learning as plain functions, on torch.func.

Names load on first use, so that accounting and the command line never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dpfunc import accounting, models, optimizers, random, testing
    from dpfunc.accounting import (
        Repeats,
        Statement,
        attack_advantage,
        calibrate_noise_multiplier,
        calibrate_num_steps,
        calibrate_sampling_prob,
        delta,
        delta_bounds,
        epsilon,
        epsilon_bounds,
        gaussian_delta,
        gaussian_epsilon,
        gdp_summary,
        posterior_odds,
        privacy_profile,
        read_log,
        remaining,
        selection_epsilon,
        trade_off,
        write_log,
    )
    from dpfunc.events import Log, StepEvent, append, combined_noise_multiplier
    from dpfunc.gradients import (
        Clipped,
        ClippedWithAux,
        Explanation,
        FlatClipping,
        clip_and_sum,
        clipped_grad,
        explain,
        per_sample_grads,
        register_rule,
    )
    from dpfunc.mechanism import DPSGD
    from dpfunc.models import functional_loss
    from dpfunc.sampling import Batch, overflow_probability, poisson_batches, poisson_indices
    from dpfunc.step import (
        PartialEvent,
        TrainState,
        clip_and_noise,
        make_dp_step,
        make_train_step,
        private_grad,
    )
    from dpfunc.typing import ClippingRule

_ROOMS = {
    "accounting": (
        "Repeats Statement attack_advantage calibrate_noise_multiplier calibrate_num_steps "
        "calibrate_sampling_prob delta delta_bounds epsilon epsilon_bounds gaussian_delta "
        "gaussian_epsilon gdp_summary posterior_odds privacy_profile read_log remaining "
        "selection_epsilon trade_off write_log"
    ),
    "events": "Log StepEvent append combined_noise_multiplier",
    "gradients": (
        "Clipped ClippedWithAux Explanation FlatClipping clip_and_sum clipped_grad explain "
        "per_sample_grads register_rule"
    ),
    "mechanism": "DPSGD",
    "models": "functional_loss",
    "sampling": "Batch overflow_probability poisson_batches poisson_indices",
    "typing": "ClippingRule",
    "step": "PartialEvent TrainState clip_and_noise make_dp_step make_train_step private_grad",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}
_MODULES = ("accounting", "models", "optimizers", "random", "testing")

__all__ = [
    "DPSGD",
    "Batch",
    "Clipped",
    "ClippedWithAux",
    "ClippingRule",
    "Explanation",
    "FlatClipping",
    "Log",
    "PartialEvent",
    "Repeats",
    "Statement",
    "StepEvent",
    "TrainState",
    "__version__",
    "accounting",
    "append",
    "attack_advantage",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "calibrate_sampling_prob",
    "clip_and_noise",
    "clip_and_sum",
    "clipped_grad",
    "combined_noise_multiplier",
    "delta",
    "delta_bounds",
    "epsilon",
    "epsilon_bounds",
    "explain",
    "functional_loss",
    "gaussian_delta",
    "gaussian_epsilon",
    "gdp_summary",
    "make_dp_step",
    "make_train_step",
    "models",
    "optimizers",
    "overflow_probability",
    "per_sample_grads",
    "poisson_batches",
    "poisson_indices",
    "posterior_odds",
    "privacy_profile",
    "private_grad",
    "random",
    "read_log",
    "register_rule",
    "remaining",
    "selection_epsilon",
    "testing",
    "trade_off",
    "write_log",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dpfunc.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"dpfunc.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpfunc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
