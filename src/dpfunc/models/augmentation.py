"""Augmentation multiplicity: one example's gradient is that of several augmented copies, averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpfunc import _checks, random
from dpfunc.typing import Key, Loss, Params, Tree


def average_over_augmentations(
    loss: Loss, augment: Callable[[Tree, Key], Tree], *, num: int, has_key: bool = False
) -> Loss:
    """Make a loss that averages over augmented copies of its one example.

    Args:
        loss: `loss(params, example) -> scalar`; with has_key, `loss(params, example, key)`.
        augment: `augment(example, key) -> example`, pure: all its randomness comes from the key.
        num: how many copies, >= 1.
        has_key: whether loss takes a key of its own, for dropout say.

    Returns:
        `f(params, example, key) -> scalar`: pass `has_key=True` where it is differentiated.

    Guarantees:
        The copies of an example are averaged before its gradient is clipped, so that they are one
        example's contribution: privacy does not depend on num.
        Copy i is a function of the example, the key and i. A loss with a key gets another for each copy.

    Raises:
        ValueError, TypeError: num is no whole number >= 1.

    Source: De et al. 2022, arXiv:2204.13650, section 3.2.

    >>> shifted = lambda x, key: x + random.normal(key, x.shape)
    >>> loss = average_over_augmentations(lambda w, x: w @ x, shifted, num=4)
    >>> loss(torch.ones(2), torch.ones(2), random.key(0)).shape
    torch.Size([])
    """
    num = _checks.integer(at_least=1, num=num)

    def averaged(params: Params, example: Tree, key: Key) -> Tensor:
        keys = random.derive(key, random.AUGMENTATION, list(range(2 * num)))
        losses = []
        for i in range(num):  # a loop and not vmap: book-keeping sees the ops of every copy
            copy = augment(example, keys[i])
            losses.append(loss(params, copy, keys[num + i]) if has_key else loss(params, copy))
        return torch.stack(losses).mean()

    return averaged
