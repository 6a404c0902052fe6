"""Tests of privacy to import: laws, strategies that break them, and `check_private` for a loss of your own.

A law is a plain function that raises AssertionError with the counterexample in words:

    @given(strategies.clipping_cases())
    def test_my_rule(case):
        laws.contribution_is_bounded(case.grads, my_rule, case.mask)

The strategies need hypothesis: `pip install dpfunc[testing]`. Nothing else here does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpfunc.testing import laws, strategies
    from dpfunc.testing.check import Finding, PrivacyReport, check_private

_CHECK = ("Finding", "PrivacyReport", "check_private")

__all__ = ["Finding", "PrivacyReport", "check_private", "laws", "strategies"]


def __getattr__(name: str) -> Any:
    if name in _CHECK:
        return getattr(importlib.import_module("dpfunc.testing.check"), name)
    if name in __all__:
        return importlib.import_module(f"dpfunc.testing.{name}")
    raise AttributeError(f"module 'dpfunc.testing' has no attribute {name!r}")
