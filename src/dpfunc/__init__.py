"""Differentially private deep learning as plain functions, on torch.func.

Names load on first use, so that accounting and the command line never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dpfunc import accounting, audit, models, optimizers, random, schedules, testing
    from dpfunc.accounting import (
        Header,
        LogFile,
        Repeats,
        RunLog,
        Statement,
        Verification,
        account_as,
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
        read_run,
        remaining,
        selection_epsilon,
        trade_off,
        verify_log,
        write_log,
    )
    from dpfunc.audit import (
        AuditReport,
        audit_step,
    )
    from dpfunc.events import (
        Log,
        StepEvent,
        append,
        combined_noise_multiplier,
        noise_multiplier_beside,
    )
    from dpfunc.gradients import (
        AutomaticClipping,
        Clipped,
        ClippedWithAux,
        CustomClipping,
        Explanation,
        FlatClipping,
        L1Clipping,
        Observation,
        PerGroupClipping,
        PerSampleAdaptiveClipping,
        clip_and_sum,
        clipped_grad,
        explain,
        observe,
        per_sample_grads,
        register_rule,
    )
    from dpfunc.mechanism import (
        DPSGD,
        ScheduledClipping,
    )
    from dpfunc.models import (
        average_over_augmentations,
        functional_loss,
    )
    from dpfunc.sampling import (
        Batch,
        overflow_probability,
        poisson_batches,
        poisson_indices,
    )
    from dpfunc.schedules import (
        Schedule,
    )
    from dpfunc.step import (
        Accumulated,
        Accumulator,
        PartialEvent,
        TrainState,
        clip_and_noise,
        in_place,
        make_accumulator,
        make_dp_step,
        make_train_step,
        parts_of,
        private_grad,
    )
    from dpfunc.telemetry import (
        AdaptiveClipping,
        ClipFraction,
        MeanLoss,
        NormQuantile,
    )
    from dpfunc.testing import (
        Finding,
        PrivacyReport,
        check_private,
    )
    from dpfunc.training import (
        Checkpoint,
        Fitted,
        Saving,
        Trained,
        fit,
        load_checkpoint,
        save_checkpoint,
        train,
    )
    from dpfunc.typing import (
        ClippingRule,
        Observed,
        Query,
    )

_ROOMS = {
    "accounting": (
        "Header LogFile Repeats RunLog Statement Verification account_as attack_advantage "
        "calibrate_noise_multiplier calibrate_num_steps calibrate_sampling_prob delta "
        "delta_bounds epsilon epsilon_bounds gaussian_delta gaussian_epsilon gdp_summary "
        "posterior_odds privacy_profile read_log read_run remaining selection_epsilon trade_off "
        "verify_log write_log"
    ),
    "audit": "AuditReport audit_step",
    "events": "Log StepEvent append combined_noise_multiplier noise_multiplier_beside",
    "gradients": (
        "AutomaticClipping Clipped ClippedWithAux CustomClipping Explanation FlatClipping "
        "L1Clipping Observation PerGroupClipping PerSampleAdaptiveClipping clip_and_sum "
        "clipped_grad explain observe per_sample_grads register_rule"
    ),
    "mechanism": "DPSGD ScheduledClipping",
    "models": "average_over_augmentations functional_loss",
    "sampling": "Batch overflow_probability poisson_batches poisson_indices",
    "schedules": "Schedule",
    "step": (
        "Accumulated Accumulator PartialEvent TrainState clip_and_noise in_place make_accumulator "
        "make_dp_step make_train_step parts_of private_grad"
    ),
    "telemetry": "AdaptiveClipping ClipFraction MeanLoss NormQuantile",
    "testing": "Finding PrivacyReport check_private",
    "training": ("Checkpoint Fitted Saving Trained fit load_checkpoint save_checkpoint train"),
    "typing": "ClippingRule Observed Query",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}
_MODULES = ("accounting", "audit", "models", "optimizers", "random", "schedules", "testing")

__all__ = [
    "DPSGD",
    "Accumulated",
    "Accumulator",
    "AdaptiveClipping",
    "AuditReport",
    "AutomaticClipping",
    "Batch",
    "Checkpoint",
    "ClipFraction",
    "Clipped",
    "ClippedWithAux",
    "ClippingRule",
    "CustomClipping",
    "Explanation",
    "Finding",
    "Fitted",
    "FlatClipping",
    "Header",
    "L1Clipping",
    "Log",
    "LogFile",
    "MeanLoss",
    "NormQuantile",
    "Observation",
    "Observed",
    "PartialEvent",
    "PerGroupClipping",
    "PerSampleAdaptiveClipping",
    "PrivacyReport",
    "Query",
    "Repeats",
    "RunLog",
    "Saving",
    "Schedule",
    "ScheduledClipping",
    "Statement",
    "StepEvent",
    "TrainState",
    "Trained",
    "Verification",
    "__version__",
    "account_as",
    "accounting",
    "append",
    "attack_advantage",
    "audit",
    "audit_step",
    "average_over_augmentations",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "calibrate_sampling_prob",
    "check_private",
    "clip_and_noise",
    "clip_and_sum",
    "clipped_grad",
    "combined_noise_multiplier",
    "delta",
    "delta_bounds",
    "epsilon",
    "epsilon_bounds",
    "explain",
    "fit",
    "functional_loss",
    "gaussian_delta",
    "gaussian_epsilon",
    "gdp_summary",
    "in_place",
    "load_checkpoint",
    "make_accumulator",
    "make_dp_step",
    "make_train_step",
    "models",
    "noise_multiplier_beside",
    "observe",
    "optimizers",
    "overflow_probability",
    "parts_of",
    "per_sample_grads",
    "poisson_batches",
    "poisson_indices",
    "posterior_odds",
    "privacy_profile",
    "private_grad",
    "random",
    "read_log",
    "read_run",
    "register_rule",
    "remaining",
    "save_checkpoint",
    "schedules",
    "selection_epsilon",
    "testing",
    "trade_off",
    "train",
    "verify_log",
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
