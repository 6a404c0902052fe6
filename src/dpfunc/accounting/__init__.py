"""From a log of what ran to (epsilon, delta): pure functions, numpy and scipy, no torch."""

from dpfunc.accounting.calibration import (
    calibrate_noise_multiplier,
    calibrate_num_steps,
    calibrate_sampling_prob,
)
from dpfunc.accounting.epsilon import ACCOUNTANTS, delta, epsilon
from dpfunc.accounting.logfile import read_log, write_log
from dpfunc.accounting.statement import Statement

__all__ = [
    "ACCOUNTANTS",
    "Statement",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "calibrate_sampling_prob",
    "delta",
    "epsilon",
    "read_log",
    "write_log",
]
