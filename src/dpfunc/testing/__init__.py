"""Strategies and laws for property tests of clipping. Needs hypothesis: `pip install dpfunc[testing]`.

A law is a plain function that raises AssertionError with the counterexample in words:

    @given(strategies.clipping_cases())
    def test_my_rule(case):
        laws.contribution_is_bounded(case.grads, my_rule, case.mask)
"""

from dpfunc.testing import laws, strategies

__all__ = ["laws", "strategies"]
