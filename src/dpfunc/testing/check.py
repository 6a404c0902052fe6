"""`check_private`: the laws of a private step, held against a user's own loss in one call."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import random, trees
from dpfunc.gradients import Clipped, Explanation, clipped_grad, explain, per_sample_grads
from dpfunc.mechanism import DPSGD, check_mechanism, order_of, sensitivity_of
from dpfunc.testing.laws import exact_norm
from dpfunc.typing import Key, Loss, Params, Tree

METHODS = ("bookkeeping", "two_pass")
_CLOSE = 2e-4
"""Of the norm of a sum: what the methods may differ by."""
_MOST_EXAMPLES = 8


class Finding(NamedTuple):
    """What one check found."""

    check: str
    passed: bool
    told: str
    """What was seen, or the first counterexample."""


@dataclass(frozen=True, repr=False)
class PrivacyReport:
    """What `check_private` found: true where every check passed. It prints as a table."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        rows = [
            textwrap.fill(
                f"{finding.check:<22}{'ok' if finding.passed else 'FAILED':<8}{finding.told}",
                width=110,
                subsequent_indent=" " * 30,
            )
            for finding in self.findings
        ]
        passed = len(self.findings) - len(self.failed)
        return "\n".join([*rows, f"{passed} of {len(self.findings)} checks passed"])

    __repr__ = __str__


def check_private(
    loss: Loss,
    params: Params,
    data: Tree,
    mechanism: DPSGD,
    *,
    has_key: bool = False,
    compile: bool = True,
) -> PrivacyReport:
    """Hold a loss of your own against the laws of a private step.

    Args:
        loss: `loss(params, example) -> scalar`, or `loss(params, example, key)` with has_key.
        params: to differentiate at; random ones show more than zeros.
        data: a few examples, leaves (B, ...) with B >= 2; the first 8 are used. What they show in a
            counterexample is PRIVATE, if they are.
        mechanism: whose clipping is checked; adaptive and scheduled clipping at its first factor of 1.
        has_key: whether loss takes a key.
        compile: whether to compile too, which takes seconds.

    Returns:
        A PrivacyReport: true where all is well; `str` is a table with the first counterexample of
        each check that failed.

    Guarantees:
        It never raises because of what the loss does: an error of the loss is a finding.
        params and data are unchanged, unless the loss changes them, which is a finding.
        It samples: what it finds is wrong, and what it does not find is not thereby proved.

    Raises:
        TypeError: mechanism is no DPSGD.
        ValueError: fewer than two examples.

    Source: the guarantees of `clipped_grad`, each tried on this loss.

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> data = torch.linspace(-1, 1, 12).reshape(4, 3)
    >>> report = check_private(lambda w, x: (w @ x) ** 2, torch.ones(3), data, mechanism, compile=False)
    >>> bool(report), report.findings[0]
    (True, Finding(check='runs', passed=True, told='a scalar for each of 4 examples'))
    """
    check_mechanism(mechanism)
    num = trees.batch_size(data, "data")
    if num < 2:
        raise ValueError(f"Expected at least two examples in data, got {num}.")
    few = trees.rows(data, 0, _MOST_EXAMPLES)
    trial = _Trial(loss, params, few, mechanism.rule, has_key)
    checks: dict[str, Callable[[], str]] = {
        "runs": trial.runs,
        "closes over no data": trial.closes_over_no_data,
        "examples kept apart": trial.examples_are_kept_apart,
        "methods agree": trial.methods_agree,
        "bounded contribution": trial.contributions_are_bounded,
        "neighbours": trial.neighbours_are_close,
        "poison and padding": trial.poison_and_padding_vanish,
        "purity": trial.is_pure,
        "randomness": trial.draws_from_its_key,
        "dtypes": trial.takes_other_dtypes,
        **({"compile": trial.compiles} if compile else {}),
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, True, check()))
        except Exception as error:
            told = f"{type(error).__name__}: " * (not isinstance(error, AssertionError)) + str(
                error
            )
            findings.append(Finding(name, False, " ".join(told.split())[:600]))
            if name == "runs":  # all others would say the same
                break
    return PrivacyReport(tuple(findings))


class _Trial(NamedTuple):
    loss: Loss
    params: Params
    data: Tree
    rule: Any
    has_key: bool

    @property
    def num(self) -> int:
        return trees.batch_size(self.data, "data")

    @property
    def key(self) -> Key | None:
        return random.key(0) if self.has_key else None

    def grads(self, data: Tree, key: Key | None = None) -> Tree:
        return per_sample_grads(self.loss, has_key=self.has_key)(
            self.params, data, key=self.key if key is None else key
        )

    def clipped(self, data: Tree, method: str = "auto", mask: Tensor | None = None) -> Clipped:
        f = clipped_grad(self.loss, self.rule, method=method, has_key=self.has_key)
        return f(self.params, data, mask=mask, key=self.key)

    def runs(self) -> str:
        grads = self.grads(self.data)
        if not any(bool((leaf != 0).any()) for leaf in trees.leaves(grads)):
            raise AssertionError(
                "every gradient is 0: at these params the checks would show nothing"
            )
        return f"a scalar for each of {self.num} examples"

    def closes_over_no_data(self) -> str:
        """A loss that reaches the whole batch by another way than its argument."""
        places = {leaf.untyped_storage().data_ptr() for leaf in trees.leaves(self.data)}
        for name, held in _reached(self.loss):
            if held.numel() and held.untyped_storage().data_ptr() in places:
                raise AssertionError(
                    f"the loss reaches {name}, which shares its memory with data: one example's loss may "
                    "look at no other"
                )
        return "no tensor that it reaches shares memory with data"

    def examples_are_kept_apart(self) -> str:
        """Change one example: whose gradient moves?"""
        before = self.grads(self.data)
        for j in range(self.num):
            for how, changed in _changed(self.data, j):
                after = self.grads(changed)
                for (path, a), b in zip(
                    trees.named_leaves(before, "params"), trees.leaves(after), strict=True
                ):
                    same = (a == b) | (a.isnan() & b.isnan())
                    moved = (~same).flatten(1).any(1) if a.ndim > 1 else ~same
                    moved[j] = False
                    if moved.any():
                        i = int(moved.nonzero()[0])
                        raise AssertionError(
                            f"{how} example {j} moves the gradient of example {i} at {path}: each "
                            "example's loss must depend on that example alone"
                        )
        return "no gradient moves when another example is zeroed, negated, scaled or doubled"

    def methods_agree(self) -> str:
        expected = self.clipped(self.data, "vmap").sum
        size, worst = exact_norm(expected), 0.0
        for method in METHODS:
            got = self.clipped(self.data, method).sum
            off = exact_norm(trees.map(lambda a, b: a.double() - b.double(), got, expected))
            if not off <= _CLOSE * max(size, 1e-12):
                raise AssertionError(
                    f"method {method!r} differs from 'vmap' by {off / max(size, 1e-300):.2e} of the sum's norm"
                )
            worst = max(worst, off / max(size, 1e-300))
        paths = [p.path for p in self._explained().paths]
        factored = sum(path == "factors" for path in paths)
        return f"the sums differ by {worst:.0e} of their norm; {factored} of {len(paths)} parameters by factors"

    def _explained(self) -> Explanation:
        return explain(self.loss, self.params, self.data, key=self.key, has_key=self.has_key)

    def contributions_are_bounded(self) -> str:
        """Each example alone, as it is and at the ends of its format."""
        most, worst = sensitivity_of(self.rule), 0.0
        for row in range(self.num):
            for how, data in _extremes(trees.rows(self.data, row, row + 1)):
                for method in ("vmap", *METHODS):
                    norm = exact_norm(self.clipped(data, method).sum, order_of(self.rule))
                    if not norm <= most:
                        raise AssertionError(
                            f"example {row}, {how}, contributes a vector of norm {norm!r} by {method!r}, "
                            f"above the sensitivity {most!r}"
                        )
                    worst = max(worst, norm / most)
        return f"at most {worst:.6f} of the sensitivity, also at extreme values"

    def neighbours_are_close(self) -> str:
        """Remove, add, double and replace an example, and empty the batch, all without noise."""
        most, order = sensitivity_of(self.rule), order_of(self.rule)
        rounding = most * self.num**2 * 2.0**-20  # of sums in float32, by any method
        worst = 0.0
        everyone = torch.ones(self.num, dtype=torch.bool)
        for method in ("vmap", *METHODS):
            whole = self.clipped(self.data, method, everyone).sum
            for row in range(self.num):
                without = self.clipped(self.data, method, torch.arange(self.num) != row).sum
                other = (row + 1) % self.num
                replaced = trees.map(lambda x, r=row, o=other: _put(x, r, x[o]), self.data)
                swapped = self.clipped(replaced, method).sum
                for how, sums, times in (("removing", without, 1), ("replacing", swapped, 2)):
                    moved = exact_norm(
                        trees.map(lambda a, b: a.double() - b.double(), whole, sums), order
                    )
                    if not moved <= times * most + rounding:
                        raise AssertionError(
                            f"{how} example {row} moves the clipped sum by {moved!r} with {method!r}, "
                            f"above {times} times the sensitivity {most!r}"
                        )
                    worst = max(worst, moved / times / most)
            nobody = self.clipped(self.data, method, ~everyone).sum
            empty = self.clipped(trees.rows(self.data, 0, 0), method).sum
            if exact_norm(nobody) != 0.0 or exact_norm(empty) != 0.0:
                raise AssertionError(f"an empty batch gives a sum that is not 0 with {method!r}")
        return f"one example moves the sum by at most {worst:.6f} of what it may"

    def poison_and_padding_vanish(self) -> str:
        floating = [leaf for leaf in trees.leaves(self.data) if leaf.is_floating_point()]
        if not floating:
            return "no floating-point data to poison"
        for method in ("vmap", *METHODS):
            mask = torch.arange(self.num) != 0
            expected = self.clipped(self.data, method, mask).sum
            for poison in (math.nan, math.inf):
                bad = trees.map(lambda x, p=poison: _filled(x, 0, p), self.data)
                padded, kept = self.clipped(bad, method, mask).sum, self.clipped(bad, method).sum
                for what, got in (("padding", padded), ("an example", kept)):
                    finite = all(bool(leaf.isfinite().all()) for leaf in trees.leaves(got))
                    moved = exact_norm(
                        trees.map(lambda a, b: a.double() - b.double(), got, expected)
                    )
                    # A finite gradient out of poisoned data (a clamp, a where) may contribute.
                    most = sensitivity_of(self.rule) if what == "an example" else 0.0
                    if not finite or not moved <= most * (1 + 2.0**-10):
                        raise AssertionError(
                            f"{what} of {poison} moves the clipped sum by {moved!r} with {method!r}"
                        )
        return "NaN and infinity, in an example or in padding, leave the sum of the others alone"

    def is_pure(self) -> str:
        before = trees.map(torch.clone, (self.params, self.data))
        generator = torch.get_rng_state()
        first, second = self.clipped(self.data), self.clipped(self.data)
        if not torch.get_rng_state().equal(generator):
            raise AssertionError("it draws from torch's global generator")
        for a, b in zip(trees.leaves(first.sum), trees.leaves(second.sum), strict=True):
            if not a.equal(b):
                raise AssertionError("the same call gives other bits the second time")
            if a.requires_grad:
                raise AssertionError("the sum keeps a graph of gradients")
        now = trees.leaves((self.params, self.data))
        for a, b in zip(trees.leaves(before), now, strict=True):
            if not (a == b).logical_or(a != a).all():
                raise AssertionError("params or data are changed by a call")
        return "the same bits twice, arguments unchanged, no global randomness"

    def draws_from_its_key(self) -> str:
        if not self.has_key:
            return "none: the loss takes no key, and random operations in it are errors"
        twins = trees.map(lambda x: x[:1].expand(2, *x.shape[1:]), self.data)
        again, same = self.grads(twins, random.key(1)), self.grads(twins, random.key(1))
        other = self.grads(twins, random.key(2))
        pairs = list(zip(trees.leaves(again), trees.leaves(same), trees.leaves(other), strict=True))
        if not all(a.equal(b) for a, b, _ in pairs):
            raise AssertionError("the same key gives other gradients: something draws past the key")
        if all(a.equal(c) for a, _, c in pairs):
            return "gradients do not depend on the key here"
        if all(a[0].equal(a[1]) for a, _, _ in pairs):
            raise AssertionError("two equal examples draw alike: their keys are not used apart")
        return "a function of the key, and different for two equal examples"

    def takes_other_dtypes(self) -> str:
        def to(dtype: torch.dtype, tree: Tree) -> Tree:
            return trees.map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)

        told = []
        base = self.clipped(self.data, "vmap").sum
        for dtype, most in ((torch.float64, 1e-3), (torch.bfloat16, None)):
            trial = self._replace(params=to(dtype, self.params), data=to(dtype, self.data))
            got = trial.clipped(trial.data, "vmap").sum
            if any(leaf.dtype not in (torch.float32, torch.float64) for leaf in trees.leaves(got)):
                raise AssertionError(f"a sum of {dtype} gradients is shorter than float32")
            off = exact_norm(trees.map(lambda a, b: a.double() - b.double(), got, base))
            off /= max(exact_norm(base), 1e-300)
            if most is not None and not self.has_key and not off <= most:
                raise AssertionError(
                    f"in {dtype} the clipped sum differs by {off:.2e} of its norm: the loss is near a "
                    "branch, or loses its digits"
                )
            told.append(f"{str(dtype).removeprefix('torch.')} within {off:.0e}")
        return ", ".join(told)

    def compiles(self) -> str:
        f = clipped_grad(self.loss, self.rule, has_key=self.has_key)
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        got, expected = compiled(self.params, self.data, key=self.key), self.clipped(self.data)
        off = exact_norm(
            trees.map(lambda a, b: a.double() - b.double(), got.sum, expected.sum)
        ) / max(exact_norm(expected.sum), 1e-300)
        if not off <= _CLOSE:
            raise AssertionError(f"compiled, the clipped sum differs by {off:.2e} of its norm")
        return f"one graph; compiled and eager differ by {off:.0e}"


def _reached(function: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a function holds: in its closure and those of functions it closes over."""
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = [("", function)]
    while queue:
        name, thing = queue.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield name, thing
        elif isinstance(thing, (tuple, list)):
            queue += [(f"{name}[{i}]", part) for i, part in enumerate(thing)]
        elif isinstance(thing, dict):
            queue += [(f"{name}[{key!r}]", part) for key, part in thing.items()]
        elif callable(thing) and hasattr(thing, "__code__"):
            bound = inspect.getclosurevars(inspect.unwrap(thing))
            queue += [*bound.nonlocals.items(), *bound.globals.items()]


def _changed(data: Tree, row: int) -> Iterator[tuple[str, Tree]]:
    """The data with one example changed, in every way that keeps integers what they are."""
    changes = {"zeroing": 0.0, "negating": -1.0, "scaling": 1e3}
    for how, factor in changes.items():
        yield how, trees.map(lambda x, f=factor: _put(x, row, f * x[row]), data)
    num = trees.batch_size(data, "data")
    yield "doubling another over", trees.map(lambda x: _put(x, row, x[(row + 1) % num]), data)


def _extremes(example: Tree) -> Iterator[tuple[str, Tree]]:
    yield "as it is", example
    for factor in (0.0, 1e4, -1e8, 1e-20):
        yield f"times {factor:g}", trees.map(lambda x, f=factor: _times(x, f), example)


def _times(x: Tensor, factor: float) -> Tensor:
    return x * factor if x.is_floating_point() else x


def _put(x: Tensor, row: int, value: Tensor) -> Tensor:
    """The leaf with one row replaced; of integers only by one of themselves."""
    if not x.is_floating_point() and value.is_floating_point():
        return x
    out = x.clone()
    out[row] = value.to(x.dtype)
    return out


def _filled(x: Tensor, row: int, value: float) -> Tensor:
    if not x.is_floating_point():
        return x
    out = x.clone()
    out[row] = value
    return out
