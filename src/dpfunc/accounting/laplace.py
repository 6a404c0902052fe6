"""Two pairs beyond the Gaussian: the sampled Laplace mechanism, and fixed-size sampling.

Both have atoms: losses that a whole interval of outcomes shares. `atoms` lists them as
(loss, P, Q); `masses` counts each in the interval (a, b] that holds its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpfunc.accounting.pairs import Array, GaussianPair

Atoms = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class LaplacePair:
    """P = sum over j of above[j] Laplace(j, noise) against Q = sum over j of below[j] Laplace(-j, noise).

    One of the two is (1.0,), the other has two weights. With z = the single step of size 1 taken
    by the other, the log density ratio of that step is (2 x - 1) / noise at outcomes x in [0, 1],
    and -1 / noise and 1 / noise outside: these are the atoms.

    Source: Zhu, Dong, Wang 2022, arXiv:2106.08567, Theorem 11 for the sampled pair.
    """

    noise: float
    above: tuple[float, ...]
    below: tuple[float, ...]

    @property
    def support(self) -> tuple[float, float]:
        return self.atoms[0][0], self.atoms[-1][0]

    @property
    def atoms(self) -> Atoms:
        stay, move = self._weights
        far = math.exp(-1 / self.noise) / 2  # beyond the other's centre; 1/2 beyond one's own
        low = (_loss(stay, move, -1 / self.noise), stay / 2 + move * far, 0.5)
        high = (_loss(stay, move, 1 / self.noise), stay * far + move / 2, far)
        if len(self.below) == 1:
            return low, high
        return (-high[0], high[2], high[1]), (-low[0], low[2], low[1])

    def masses(self, losses: Array) -> tuple[Array, Array]:
        if len(self.below) == 1:
            return self._forward(losses)
        # The loss is minus that of the pair with its sides exchanged: {a < L <= b} becomes
        # {-b <= M < -a}, and where the atoms lie matters, so each end moves by one float.
        q, p = self._forward(np.nextafter(-losses[::-1], -np.inf))
        return p[::-1], q[::-1]

    @property
    def _weights(self) -> tuple[float, float]:
        stay, move = self.above if len(self.below) == 1 else self.below
        return stay, move

    def _forward(self, losses: Array) -> tuple[Array, Array]:
        """The masses for stay Laplace(0) + move Laplace(1) against Laplace(0)."""
        stay, move = self._weights
        atoms = LaplacePair(self.noise, (stay, move), (1.0,)).atoms
        low, high = atoms[0][0], atoms[1][0]
        inside = (losses > low) & (losses < high)
        x = np.where(losses <= low, 0.0, 1.0)
        x[inside] = np.clip((self.noise * _ratio(stay, move, losses[inside]) + 1) / 2, 0.0, 1.0)
        # Density e^(-x / noise) / (2 noise) of the one at 0, mirrored of the one at 1.
        wide = -np.expm1(-np.diff(x) / self.noise) / 2
        single = np.exp(-x[:-1] / self.noise) * wide
        moved = np.exp(-(1 - x[1:]) / self.noise) * wide
        mixed = stay * single + move * moved
        for loss, p, q in atoms:
            here = (losses[:-1] < loss) & (loss <= losses[1:])
            mixed, single = mixed + p * here, single + q * here
        return mixed, single


@dataclass(frozen=True, slots=True)
class SplicedPair:
    """Sampling a fixed number of examples without replacement, one of them replaced.

    The Gaussian pair P = N(2, noise^2), Q = N(0, noise^2), in units of the clip norm, is hardest
    when the differing example is drawn. Zhu, Dong, Wang 2022 (Theorem 11) bound the profile
    delta(epsilon) by that of ((1 - q) Q + q P, Q) for epsilon >= 0 and by that of
    (P, (1 - q) P + q Q) for epsilon < 0. With S = {P > Q}, which is where either loss is positive,
    the two profiles agree at 0, where both are q (P(S) - Q(S)), and their slopes in e^epsilon are
    -Q(S) and -(1 - q) P(S) - q Q(S). So the profile is convex, that of the loss which has the law of
    the first pair above 0, of the second below 0, and at 0 an atom of (1 - q) (P(S) - Q(S)) under
    either side: the difference of the slopes.
    """

    noise: float
    sampling_prob: float

    @property
    def support(self) -> tuple[float, float]:
        return self._negative.support[0], self._positive.support[1]

    @property
    def atoms(self) -> Atoms:
        # P(S) - Q(S) = P(|N(0, 1)| < 1 / noise), as P and Q are 2 / noise deviations apart.
        mass = (1 - self.sampling_prob) * math.erf(1 / self.noise / math.sqrt(2))
        return ((0.0, mass, mass),)

    def masses(self, losses: Array) -> tuple[Array, Array]:
        p_above, q_above = self._positive.masses(np.maximum(losses, 0.0))
        p_below, q_below = self._negative.masses(np.minimum(losses, 0.0))
        ((_, mass, _),) = self.atoms
        atom = mass * ((losses[:-1] < 0) & (losses[1:] >= 0))
        return p_above + p_below + atom, q_above + q_below + atom

    @property
    def _positive(self) -> GaussianPair:
        q = self.sampling_prob
        return GaussianPair(self.noise / 2, (1 - q, q), (1.0,))

    @property
    def _negative(self) -> GaussianPair:
        q = self.sampling_prob
        return GaussianPair(self.noise / 2, (1.0,), (1 - q, q))


def _loss(stay: float, move: float, ratio: float) -> float:
    """log(stay + move e^ratio), where stay + move = 1."""
    if stay > 0 and ratio < 1:
        return math.log1p(move * math.expm1(ratio))
    return ratio + math.log(move + stay * math.exp(-ratio)) if stay > 0 else ratio


def _ratio(stay: float, move: float, losses: Array) -> Array:
    """The ratio whose `_loss` it is, without overflow."""
    near = np.log1p(np.expm1(np.minimum(losses, 1.0)) / move)
    far = losses + np.log1p(-stay * np.exp(-np.maximum(losses, 1.0))) - math.log(move)
    return np.where(losses < 1, near, far)
