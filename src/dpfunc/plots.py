"""Pictures of a run. matplotlib is an extra: `pip install dpfunc[train]`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8641b", "#666666"


def draw_run(
    path: str | os.PathLike[str],
    *,
    steps: Sequence[int],
    accuracy: Sequence[float],
    epsilon: Sequence[float],
    norms: ArrayLike,
    l2_clip_norm: float,
    title: str,
) -> None:
    """Draw accuracy and epsilon over the steps, and the norms before clipping, to a file.

    Args:
        path: of the picture; the ending says the format.
        steps, accuracy, epsilon: of equal length; accuracy in [0, 1] on held-out examples.
        norms: (n,) L2 norms of per-example gradients before clipping. PRIVATE: so is the picture.
        l2_clip_norm: where they are clipped, in gradient units.
        title: one line above.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)

    left.plot(steps, accuracy, color=_BLUE)
    left.set(xlabel="step", ylim=(0, 1))
    left.set_ylabel("validation accuracy", color=_BLUE)
    spent = left.twinx()
    spent.plot(steps, epsilon, color=_ORANGE, linestyle="--")
    spent.set_ylim(bottom=0)
    spent.set_ylabel("epsilon spent", color=_ORANGE)
    left.set_title("Utility and budget")

    values = np.asarray(norms, dtype=float)
    values = np.clip(values[np.isfinite(values)], l2_clip_norm * 1e-4, None)
    low, high = np.log10(min([*values, l2_clip_norm])), np.log10(max([*values, l2_clip_norm]))
    right.hist(values, bins=np.logspace(low, high + 1e-6, 41), color=_GREY)  # pyright: ignore
    right.set_xscale("log")
    right.axvline(l2_clip_norm, color=_ORANGE, linestyle="--", label=f"clip norm {l2_clip_norm:g}")
    right.set(xlabel="gradient norm before clipping", ylabel="examples")
    right.legend()
    right.set_title("PRIVATE: not differentially private, do not release", color="#b00020")
    figure.savefig(path, dpi=130)
