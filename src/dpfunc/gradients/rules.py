"""Clipping rules: from the norms of one example's gradient to a scale for each leaf.

Each is a `ClippingRule`: pure, with its sensitivity and the order of its norm. The formulas here are
elementwise, so that they take the norms of a batch as they take those of one example.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import optree
import torch
from torch import Tensor

from dpfunc import _checks, trees
from dpfunc.mechanism import OR_A_RULE, check_order, check_sensitivity, noise_scales
from dpfunc.typing import ClippingRule, Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatClipping:
    """Scale each example to L2 norm at most `l2_clip_norm` over all leaves together.

    The rule that a plain number means.

    Args:
        l2_clip_norm: the bound, in gradient units, in [1e-30, 1e30].

    Guarantees:
        A gradient within the bound is unchanged. A longer one keeps its direction.

    Raises:
        ValueError: l2_clip_norm is not positive, not finite, or out of range.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> FlatClipping(l2_clip_norm=1.0).scales([torch.tensor([2.0, 0.5])])
    [tensor([0.5000, 1.0000])]
    """

    l2_clip_norm: float

    def __post_init__(self) -> None:
        number = check_sensitivity(OR_A_RULE, l2_clip_norm=self.l2_clip_norm)
        object.__setattr__(self, "l2_clip_norm", number)

    @property
    def sensitivity(self) -> float:
        return self.l2_clip_norm

    @property
    def order(self) -> int:
        return 2

    def scales(self, norms: Tree) -> Tree:
        """The same scale min(1, l2_clip_norm / norm) for every leaf."""
        return _alike(
            norms, _within(trees.root_sum_squares(trees.leaves(norms)), self.l2_clip_norm)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class L1Clipping:
    """Scale each example to L1 norm at most `l1_clip_norm` over all leaves together: for Laplace noise.

    Args:
        l1_clip_norm: the bound on the sum of absolute values, in gradient units, in [1e-30, 1e30].

    Guarantees:
        A gradient within the bound is unchanged. A longer one keeps its direction.
        Under Gaussian noise it is valid too: an L2 norm is never above the L1 norm.

    Raises:
        ValueError: l1_clip_norm is not positive, not finite, or out of range.

    Source: Dwork et al. 2006, Calibrating Noise to Sensitivity, Proposition 1.

    >>> L1Clipping(l1_clip_norm=1.0).scales([torch.tensor(3.0), torch.tensor(1.0)])
    [tensor(0.2500), tensor(0.2500)]
    """

    l1_clip_norm: float

    def __post_init__(self) -> None:
        number = check_sensitivity(l1_clip_norm=self.l1_clip_norm)
        object.__setattr__(self, "l1_clip_norm", number)

    @property
    def sensitivity(self) -> float:
        return self.l1_clip_norm

    @property
    def order(self) -> int:
        return 1

    def scales(self, norms: Tree) -> Tree:
        """The same scale min(1, l1_clip_norm / norm) for every leaf."""
        return _alike(norms, _within(torch.stack(trees.leaves(norms)).sum(0), self.l1_clip_norm))


@dataclass(frozen=True, slots=True, kw_only=True)
class AutomaticClipping:
    """Scale each example by l2_clip_norm / (norm + stabilizer): no clip norm to tune.

    Short gradients are lengthened too, so that l2_clip_norm only rescales the learning rate.

    Args:
        l2_clip_norm: the bound, in gradient units, in [1e-30, 1e30].
        stabilizer: finite, >= 0, in gradient units: what keeps an example whose gradient vanishes
            from counting in full. 0.01 is the paper's AUTO-S; 0 is AUTO-V, plain normalisation.

    Guarantees:
        Every gradient keeps its direction; one that is 0 stays 0.

    Raises:
        ValueError: a number out of range.

    Source: Bu et al. 2022, arXiv:2206.07136, AUTO-V and AUTO-S.

    >>> AutomaticClipping(stabilizer=0.0).scales([torch.tensor([4.0, 0.5])])
    [tensor([0.2500, 2.0000])]
    """

    l2_clip_norm: float = 1.0
    stabilizer: float = 0.01

    def __post_init__(self) -> None:
        number = check_sensitivity(l2_clip_norm=self.l2_clip_norm)
        object.__setattr__(self, "l2_clip_norm", number)
        number = _checks.finite_non_negative(stabilizer=self.stabilizer)
        object.__setattr__(self, "stabilizer", number)

    @property
    def sensitivity(self) -> float:
        return self.l2_clip_norm

    @property
    def order(self) -> int:
        return 2

    def scales(self, norms: Tree) -> Tree:
        """The same scale l2_clip_norm / (norm + stabilizer) for every leaf; 0 for a norm of 0."""
        total = trees.root_sum_squares(trees.leaves(norms))
        scale = self.l2_clip_norm / (total + self.stabilizer)
        scale = scale.clamp(
            max=torch.finfo(scale.dtype).max
        )  # of norms that are not normal numbers
        return _alike(norms, torch.where(total > 0, scale, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PerSampleAdaptiveClipping:
    """Scale each example by l2_clip_norm / (norm + r / (norm + r)): PSAC.

    As `AutomaticClipping`, but an example whose gradient nearly vanishes keeps a scale near
    l2_clip_norm and is not lengthened to count as much as the others.

    Args:
        l2_clip_norm: the bound, in gradient units, in [1e-30, 1e30].
        r: finite, > 0, in gradient units: norms well below it are those that nearly vanish.

    Guarantees:
        Every gradient keeps its direction. No scale is above l2_clip_norm, if r >= 1, and otherwise
        above l2_clip_norm / (2 sqrt(r) - r).

    Raises:
        ValueError: a number out of range.

    Source: Xia et al. 2023, arXiv:2212.00328, the weight of DP-PSAC.

    >>> PerSampleAdaptiveClipping(r=0.5).scales([torch.tensor([0.5, 0.0])])
    [tensor([1., 1.])]
    """

    l2_clip_norm: float = 1.0
    r: float = 0.01

    def __post_init__(self) -> None:
        number = check_sensitivity(l2_clip_norm=self.l2_clip_norm)
        object.__setattr__(self, "l2_clip_norm", number)
        object.__setattr__(self, "r", _checks.positive(r=self.r))

    @property
    def sensitivity(self) -> float:
        return self.l2_clip_norm

    @property
    def order(self) -> int:
        return 2

    def scales(self, norms: Tree) -> Tree:
        """The same scale for every leaf."""
        total = trees.root_sum_squares(trees.leaves(norms))
        return _alike(norms, self.l2_clip_norm / (total + self.r / (total + self.r)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PerGroupClipping:
    """Scale each group of leaves to a bound of its own: per layer, or any other part of the parameters.

    Args:
        l2_clip_norms: a pytree prefix of the parameters with a bound for each group, in gradient
            units. Dict keys are matched against the dotted paths of the parameters, so that "conv1"
            means {"conv1": {"weight": ...}} and "conv1.weight" alike, and may be patterns ("*.bias").
        noise: "common" adds the same noise everywhere, scaled to the root of the sum of squares of
            the bounds; "per_group" scales the noise of each of the k groups to sqrt(k) times its
            bound, which costs the same and suits bounds that differ much.

    Guarantees:
        The norm of each group is within its bound; so the sensitivity is the root of the sum of
        squares. With "per_group", the vector of norm over noise scale has norm at most 1.

    Raises:
        ValueError: a bound out of range, no bounds; and, once the parameters are seen, a group that no
            parameter is in, or a parameter that is in none or in two.

    Source: McMahan et al. 2018, arXiv:1710.06963, per-layer clipping.

    >>> rule = PerGroupClipping(l2_clip_norms={"conv*": 3.0, "readout": 4.0})
    >>> rule.sensitivity
    5.0
    >>> norms = {"conv1.weight": 6.0, "conv2.weight": 8.0, "readout.bias": 1.0}
    >>> rule.scales(trees.map(torch.tensor, norms))
    {'conv1.weight': tensor(0.3000), 'conv2.weight': tensor(0.3000), 'readout.bias': tensor(1.)}
    """

    l2_clip_norms: Any = field(hash=False)
    noise: str = "common"
    sensitivity: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _checks.choice(("common", "per_group"), noise=self.noise)
        paths, bounds, _ = optree.tree_flatten_with_path(self.l2_clip_norms)
        if not bounds:
            raise ValueError("Expected l2_clip_norms to hold at least one bound, got none.")
        named = {
            trees.dotted(path): check_sensitivity(
                **{f"l2_clip_norms[{trees.dotted(path)!r}]": bound}
            )
            for path, bound in zip(paths, bounds, strict=True)
        }
        object.__setattr__(self, "l2_clip_norms", named)
        total, squares = math.hypot(*named.values()), sum(Fraction(c) ** 2 for c in named.values())
        while Fraction(total) ** 2 < squares:  # hypot may round down, which no noise scale may
            total = math.nextafter(total, math.inf)
        object.__setattr__(self, "sensitivity", check_sensitivity(sensitivity=total))

    @property
    def order(self) -> int:
        return 2

    def scales(self, norms: Tree) -> Tree:
        """For each leaf min(1, bound / norm) of its group."""
        paths, leaves, structure = optree.tree_flatten_with_path(norms)
        groups = self._groups([trees.dotted(path) for path in paths])
        scale = {
            name: _within(
                trees.root_sum_squares(
                    [n for n, g in zip(leaves, groups, strict=True) if g == name]
                ),
                bound,
            )
            for name, bound in self.l2_clip_norms.items()
        }
        return optree.tree_unflatten(structure, [scale[group] for group in groups])

    def noise_scales(self, paths: Sequence[str]) -> list[float]:
        """For each leaf what its noise is scaled to."""
        if self.noise == "common":
            return [self.sensitivity] * len(paths)
        widen = math.sqrt(len(self.l2_clip_norms)) * (1 + 2.0**-50)  # never rounded down
        return [widen * self.l2_clip_norms[group] for group in self._groups(paths)]

    def _groups(self, paths: Sequence[str]) -> tuple[str, ...]:
        return _assigned(tuple(self.l2_clip_norms), tuple(paths))


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomClipping:
    """A rule made of a function of your own.

    Args:
        scales: norms -> scales, pure: two pytrees of the structure of the parameters with a 0-d
            float64 tensor for each leaf, of one example. Shapes alone may decide what it computes.
        sensitivity: what you promise: the vector of scale * norm over the leaves has a norm of at
            most this, in gradient units, in [1e-30, 1e30].
        order: of those norms, 1 or 2.

    Guarantees:
        It sees one example at a time. Scales that break the promise are shrunk until they keep it: a
        mistake costs utility and not privacy, and `testing.laws.scales_keep_the_promise` tells.

    Raises:
        ValueError, TypeError: scales is no function, or a number is out of range.

    >>> def soft(norms):
    ...     total = trees.root_sum_squares(trees.leaves(norms))
    ...     return trees.map(lambda norm: 1 / (1 + total), norms)
    >>> rule = CustomClipping(scales=soft, sensitivity=1.0)
    >>> rule.scales({"w": torch.tensor(3.0)})
    {'w': tensor(0.2500)}
    """

    scales: Callable[[Tree], Tree]
    sensitivity: float
    order: int = 2

    def __post_init__(self) -> None:
        if not callable(self.scales):
            raise TypeError(f"Expected scales to be a function of norms, got {self.scales!r}.")
        object.__setattr__(self, "sensitivity", check_sensitivity(sensitivity=self.sensitivity))
        check_order(self.order)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rescaled:
    """A rule applied to gradients divided by a factor, which is a 0-d tensor.

    Its contributions, and its sensitivity, are those of the rule; times the factor they are those of
    the rule with all bounds multiplied by it. A factor that is no positive number lets none count.
    """

    rule: ClippingRule
    factor: Tensor

    @property
    def sensitivity(self) -> float:
        return self.rule.sensitivity

    @property
    def order(self) -> int:
        return self.rule.order

    def scales(self, norms: Tree) -> Tree:
        # What the two divisions round, what overflows, and a factor that makes no sense,
        # `_kept_to_promise` deals with.
        factor = self.factor.to(torch.float64)
        scales = self.rule.scales(trees.map(lambda norm: norm / factor, norms))
        return trees.map(lambda scale: scale / factor, scales)

    def noise_scales(self, paths: Sequence[str]) -> Sequence[float]:
        return noise_scales(self.rule, paths)


ELEMENTWISE = (
    FlatClipping,
    L1Clipping,
    AutomaticClipping,
    PerSampleAdaptiveClipping,
    PerGroupClipping,
)
"""Rules that are known to treat the rows of a batch apart."""


def _within(norm: Tensor, bound: float) -> Tensor:
    return torch.where(norm > bound, bound / norm, 1.0)


def _alike(norms: Tree, scale: Tensor) -> Tree:
    return trees.map(lambda _: scale, norms)


@torch.compiler.assume_constant_result
def _assigned(groups: tuple[str, ...], paths: tuple[str, ...]) -> tuple[str, ...]:
    """Which group each path is in: every path in one, every group with a path."""

    def is_in(path: str, group: str) -> bool:
        return group == "" or fnmatch.fnmatchcase(path, group) or path.startswith(group + ".")

    found = [[group for group in groups if is_in(path, group)] for path in paths]
    for path, its in zip(paths, found, strict=True):
        if len(its) != 1:
            raise ValueError(
                f"Expected each parameter in one group of l2_clip_norms, got {path!r} in "
                f"{' and '.join(map(repr, its)) or 'none'} of {list(groups)}. "
                "A group is a path, the beginning of one ('conv1'), or a pattern ('*.bias')."
            )
    idle = [group for group in groups if [group] not in found]
    if idle:
        raise ValueError(
            f"Expected each group of l2_clip_norms to hold a parameter, got none in {idle[0]!r}; "
            f"the parameters are {list(paths)}."
        )
    return tuple(its[0] for its in found)
