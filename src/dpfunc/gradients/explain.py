"""Why a model costs what it costs: the path that each parameter's gradient takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpfunc import trees
from dpfunc.gradients import bookkeeping
from dpfunc.gradients.layers import PER_SAMPLE_FORMS, cheapest
from dpfunc.gradients.per_sample import check_arguments, checked
from dpfunc.typing import Key, Loss, Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """How the clipped sum of one parameter is made."""

    parameter: str
    shape: tuple[int, ...]
    ops: tuple[str, ...]
    """The ops that take it or a view of it."""
    path: str
    """"factors" of some form, or "per-sample": every example's gradient is made."""
    reason: str
    """Why not by a rule; empty where there is one."""
    flops: float
    """Floating-point operations of its norm and clipped sum, a float64 product counted twice."""
    bytes: float
    """Memory written and read for them."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A row for each parameter; prints as a table."""

    paths: tuple[Path, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "ops", "path", "MFLOP", "MB", "")
        rows = [
            (
                p.parameter,
                " x ".join(map(str, p.shape)),
                ", ".join(dict.fromkeys(p.ops)),
                p.path,
                f"{p.flops / 1e6:.1f}",
                f"{p.bytes / 1e6:.1f}",
                p.reason,
            )
            for p in self.paths
        ]
        total = (
            "total",
            "",
            "",
            "",
            *(f"{sum(float(r[i]) for r in rows):.1f}" for i in (4, 5)),
            "",
        )
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        right = (4, 5)
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows, total)
        )


def explain(
    loss: Loss,
    params: Tree,
    data: Tree,
    *,
    key: Key | None = None,
    has_aux: bool = False,
    has_key: bool = False,
) -> Explanation:
    """Say which path book-keeping takes for each parameter, and what it costs at this batch size.

    Args:
        loss, params, data, has_aux, has_key: as for `clipped_grad` and the function it returns. Only
            shapes and dtypes of data matter.
        key: (8,), as for that function, with has_key.

    Returns:
        Explanation: print it for a table of parameters, the ops they meet, the path taken, FLOPs and
        bytes. A parameter of a large "per-sample" row is what makes a model slow.

    Guarantees:
        No example is read: the paths depend on shapes alone.

    Raises:
        ValueError, TypeError, RuntimeError: as `clipped_grad`'s function.

    Source: Bu et al. 2023, arXiv:2210.00038.

    >>> loss = lambda p, x: torch.nn.functional.linear(x, p["w"], p["b"]).square().sum()
    >>> params = {"w": torch.zeros(4, 3), "b": torch.zeros(4)}
    >>> print(explain(loss, params, torch.zeros(8, 3)))
    parameter    shape  ops     path        MFLOP   MB
    params['b']  4      linear  per-sample    0.0  0.0  as small as what it touches
    params['w']  4 x 3  linear  factors       0.0  0.0
    total                                     0.0  0.0
    """
    num = check_arguments(params, data, key, has_key)
    arguments = (data,) if key is None else (data, key.unsqueeze(0))
    plan = bookkeeping.planner(loss, has_aux)(params, arguments)
    # One example of zeros: what it costs is proportional to the batch size.
    zeros = trees.map(lambda leaf: torch.zeros_like(leaf[:1]), arguments)
    skeleton, leaves = trees.numbered(trees.map(lambda leaf: leaf.detach().contiguous(), params))
    with torch.random.fork_rng(devices=[]):
        gradients, _ = bookkeeping.factored_gradients(
            checked(loss, has_aux), plan, leaves, skeleton, zeros, "different"
        )
    paths = []
    for i, (name, leaf) in enumerate(trees.named_leaves(params, "params")):
        names = [touch.function for touch in plan.touches if touch.leaf == i]
        ops = tuple(name for name in names if name != "__get__")
        each = [
            ("per-sample", _materialised(leaf))
            if isinstance(part, torch.Tensor)
            else (form := cheapest(part.costs()), part.costs()[form])
            for _, part in gradients[i]
        ]
        kinds = {"per-sample" if form in PER_SAMPLE_FORMS else "factors" for form, _ in each}
        paths.append(
            Path(
                parameter=name,
                shape=tuple(leaf.shape),
                ops=ops,
                path=" and ".join(sorted(kinds)) or "unused",
                reason=plan.reasons[i],
                flops=num * sum(cost[0] for _, cost in each),
                bytes=num * sum(cost[1] for _, cost in each),
            )
        )
    return Explanation(tuple(paths))


def _materialised(leaf: torch.Tensor) -> tuple[float, float]:
    """The gradient of one example: written, read for its norm, read for the sum."""
    return 4.0 * leaf.numel(), 12.0 * leaf.numel()
