"""Telemetry and adaptive clipping: further numbers about a batch, each with noise of its own.

Each is a `Query`: an (init, update) pair over a public state, and the value in [-1, 1] that every
example adds to a sum in between. A value is centred, so that an example that is not there adds the
middle, 0, and one that is moves the sum by at most 1: half of what a plain count or sum would need.
The gradient and all queries on one draw are one event (`DPSGD.event`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpfunc import _checks
from dpfunc.mechanism import OR_A_RULE, check_rule, check_sensitivity, sensitivity_of
from dpfunc.typing import ClippingRule, Observed


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanLoss:
    """The mean loss of the batch, of losses clamped to a public range.

    Args:
        low, high: the range, finite, low < high, in units of the loss.
        noise_multiplier: standard deviation over sensitivity, finite, >= 0. The noise of what is
            reported is noise_multiplier * (high - low) / 2 / expected_batch_size.

    Guarantees:
        A loss that is not finite counts as the middle of the range.
        It estimates the mean over the batch as far as the batch has the expected size: examples that
        are missing count as the middle.

    Raises:
        ValueError, TypeError: a number out of range.

    Source: the Gaussian mechanism on a clamped sum, Dwork and Roth 2014, Appendix A.

    >>> query = MeanLoss(low=0.0, high=4.0, noise_multiplier=50.0)
    >>> query.update(torch.tensor(0.0), torch.tensor(-0.5))
    tensor(1.)
    """

    noise_multiplier: float
    high: float
    low: float = 0.0
    name: str = "mean_loss"

    def __post_init__(self) -> None:
        _check_noise(self)
        low, high = _checks.real(low=self.low), _checks.real(high=self.high)
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"Expected low < high, both finite, got {low} and {high}.")

    @property
    def needs_loss(self) -> bool:
        return True

    @property
    def _middle_and_half(self) -> tuple[float, float]:
        return (self.low + self.high) / 2, (self.high - self.low) / 2

    def init(self) -> float:
        return math.nan  # nothing was released yet

    def value(self, observed: Observed, state: Tensor) -> Tensor:
        del state
        middle, half = self._middle_and_half
        return (observed.loss.to(torch.float64) - middle) / half

    def update(self, state: Tensor, mean: Tensor) -> Tensor:
        middle, half = self._middle_and_half
        return torch.full_like(state, middle) + half * mean


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFraction:
    """The share of the batch whose gradient norm is above the sensitivity, and so is clipped.

    Args:
        noise_multiplier: standard deviation over sensitivity, finite, >= 0. The noise of what is
            reported is noise_multiplier / 2 / expected_batch_size.

    Guarantees:
        Noise may take it out of [0, 1]: it is reported as released.

    Raises:
        ValueError, TypeError: a number out of range.

    Source: Andrew et al. 2021, arXiv:1905.03871, the count without the update.

    >>> ClipFraction(noise_multiplier=20.0).update(torch.tensor(0.0), torch.tensor(-1.0))
    tensor(0.)
    """

    noise_multiplier: float
    name: str = "clip_fraction"

    def __post_init__(self) -> None:
        _check_noise(self)

    @property
    def needs_loss(self) -> bool:
        return False

    def init(self) -> float:
        return math.nan

    def value(self, observed: Observed, state: Tensor) -> Tensor:
        del state
        return torch.where(observed.norm > observed.clip_norm, 1.0, -1.0)

    def update(self, state: Tensor, mean: Tensor) -> Tensor:
        del state
        return (1 + mean) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NormQuantile:
    """A running estimate of a quantile of the gradient norms, by geometric steps.

    Args:
        quantile: the share of norms that should lie at or below the estimate, in (0, 1).
        initial: the estimate to begin with, in gradient units, in [1e-30, 1e30].
        noise_multiplier: standard deviation over sensitivity of each step's count, finite, >= 0.
        learning_rate: how far one step goes in the logarithm, > 0.
        low, high: the estimate stays within, in gradient units.

    Guarantees:
        The estimate moves by a factor exp(learning_rate * (quantile - noisy share at or below it)),
        and by at most exp(learning_rate * 4) or its inverse in one step, whatever the noise.

    Raises:
        ValueError, TypeError: a number out of range.

    Source: Andrew et al. 2021, arXiv:1905.03871, equation 3 with its geometric update.

    >>> query = NormQuantile(quantile=0.5, initial=1.0, noise_multiplier=20.0)
    >>> query.update(torch.tensor(1.0), torch.tensor(0.0))
    tensor(1.)
    """

    quantile: float
    initial: float
    noise_multiplier: float
    learning_rate: float = 0.2
    low: float = 1e-6
    high: float = 1e6
    name: str = "norm_quantile"

    def __post_init__(self) -> None:
        _check_noise(self)
        _checks.open_unit("A share of the gradients, say 0.5.", quantile=self.quantile)
        _checks.positive(learning_rate=self.learning_rate)
        low, high = check_sensitivity(low=self.low), check_sensitivity(high=self.high)
        if not low <= check_sensitivity(initial=self.initial) <= high or low == high:
            raise ValueError(
                f"Expected low <= initial <= high, low < high, got {(low, self.initial, high)}."
            )

    @property
    def needs_loss(self) -> bool:
        return False

    def init(self) -> float:
        return self.initial

    def value(self, observed: Observed, state: Tensor) -> Tensor:
        return torch.where(observed.norm <= state, 1.0, -1.0)

    def update(self, state: Tensor, mean: Tensor) -> Tensor:
        share = (1 + mean) / 2
        # A wild count moves it no further than 4.
        power = self.learning_rate * (self.quantile - share).clamp(-4.0, 4.0)
        return (state * power.exp()).clamp(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClipping(NormQuantile):
    """Clip at a running estimate of a quantile of the gradient norms.

    The pair (init, update) of its state, the clip norm, is driven by `make_train_step`; the noise of
    the gradient is the noise multiplier times the clip norm of the step.

    Args:
        quantile: the share of gradients that should not be clipped, in (0, 1).
        initial: the clip norm to begin with, in gradient units.
        noise_multiplier: of the count: standard deviation over its sensitivity, which is 1/2 of an
            example. Andrew et al. take a tenth of the expected batch size. Together with the
            gradient's this is the event's: see `noise_multiplier_beside` for what to give the gradient.
        learning_rate: how far one step moves the logarithm of the clip norm, > 0.
        low, high: the clip norm stays within, in gradient units.
        clipping: the rule at clip norm 1: an L2 clip norm of 1 (flat), or a rule, whose bounds are
            multiplied by the clip norm over its sensitivity of 1.

    Guarantees:
        The count is centred at one half: an example moves it by 1/2. An empty batch is noise alone.
        It is divided by the public expected batch size, never by the realised one.
        The clip norm is a function of released numbers, and within [low, high].

    Raises:
        ValueError, TypeError: a number out of range, or a rule of sensitivity other than 1.

    Source: Andrew et al. 2021, arXiv:1905.03871, Algorithm 1.

    >>> AdaptiveClipping(quantile=0.5, initial=1.0, noise_multiplier=25.6).init()
    1.0
    """

    quantile: float = 0.5
    initial: float = 1.0
    clipping: float | ClippingRule = 1.0
    name: str = "clip_norm"

    def __post_init__(self) -> None:
        NormQuantile.__post_init__(self)  # super() does not know a class with slots
        if isinstance(self.clipping, ClippingRule):
            check_rule(self.clipping)
        else:
            check_sensitivity(OR_A_RULE, clipping=self.clipping)
        if sensitivity_of(self.clipping) != 1.0:
            raise ValueError(
                "Expected a rule of sensitivity 1, to be multiplied by the clip norm, got "
                f"{sensitivity_of(self.clipping)}."
            )


def _check_noise(query: object) -> None:
    number = _checks.finite_non_negative(noise_multiplier=query.noise_multiplier)  # pyright: ignore
    object.__setattr__(query, "noise_multiplier", number)
