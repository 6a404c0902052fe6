"""From a log of what ran to (epsilon, delta): pure functions, numpy and scipy, no torch.

Parts of scipy take longer to import than most answers: `scipy.special` and the others load on first use.
"""

from dpfunc.accounting.calibration import (
    calibrate_noise_multiplier,
    calibrate_num_steps,
    calibrate_sampling_prob,
    remaining,
)
from dpfunc.accounting.custom import account_as
from dpfunc.accounting.epsilon import ACCOUNTANTS, CLAIMS, delta, epsilon
from dpfunc.accounting.gdp import gaussian_delta, gaussian_epsilon
from dpfunc.accounting.logfile import read_log, read_run, write_log
from dpfunc.accounting.pld import delta_bounds, epsilon_bounds
from dpfunc.accounting.profile import (
    attack_advantage,
    gdp_summary,
    posterior_odds,
    privacy_profile,
    trade_off,
)
from dpfunc.accounting.rdp import rdp_epsilon
from dpfunc.accounting.selection import Repeats, selection_epsilon
from dpfunc.accounting.statement import Statement
from dpfunc.accounting.steplog import Attempt, Header, LogFile, RunLog, Verification, verify_log

__all__ = [
    "ACCOUNTANTS",
    "CLAIMS",
    "Attempt",
    "Header",
    "LogFile",
    "Repeats",
    "RunLog",
    "Statement",
    "Verification",
    "account_as",
    "attack_advantage",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "calibrate_sampling_prob",
    "delta",
    "delta_bounds",
    "epsilon",
    "epsilon_bounds",
    "gaussian_delta",
    "gaussian_epsilon",
    "gdp_summary",
    "posterior_odds",
    "privacy_profile",
    "rdp_epsilon",
    "read_log",
    "read_run",
    "remaining",
    "selection_epsilon",
    "trade_off",
    "verify_log",
    "write_log",
]
