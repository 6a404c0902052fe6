"""The step log on disk: a chain of lines, what they say, and whether a file is whole."""

from dpfunc.accounting.steplog.entries import Header, event_to_json
from dpfunc.accounting.steplog.fold import Attempt, RunLog, between
from dpfunc.accounting.steplog.verify import Verification, verify_log
from dpfunc.accounting.steplog.writer import LogFile

__all__ = [
    "Attempt",
    "Header",
    "LogFile",
    "RunLog",
    "Verification",
    "between",
    "event_to_json",
    "verify_log",
]
