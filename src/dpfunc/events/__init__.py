"""What ran, as data: one `StepEvent` a noisy release, in an immutable log that runs together.

A field is never removed and never changes its meaning; a new one is optional. An accountant refuses
an event that it does not know, it does not guess. Everything in an event is public.
"""

from dpfunc.events.event import (
    CUSTOM,
    MAX_COUNT,
    MECHANISMS,
    RELATIONS,
    SAMPLINGS,
    Kind,
    StepEvent,
    check_noise,
    combined_noise_multiplier,
    noise_multiplier_beside,
)
from dpfunc.events.log import AnyLog, Log, append
from dpfunc.events.store import Columns
from dpfunc.events.store import _Store as _Store  # for the tests of what threads see

__all__ = [
    "CUSTOM",
    "MAX_COUNT",
    "MECHANISMS",
    "RELATIONS",
    "SAMPLINGS",
    "AnyLog",
    "Columns",
    "Kind",
    "Log",
    "StepEvent",
    "append",
    "check_noise",
    "combined_noise_multiplier",
    "noise_multiplier_beside",
]
