"""Composite functions in the open: the same code with every op inside it visible to a mode.

`F.multi_head_attention_forward` asks first whether a mode wants the call as a whole. A mode that takes
it apart needs its body instead: the very same code object, with that one question answered no.
`Tensor.unflatten` is a method in Python that the compiler cannot follow out of a mode; the function
of the same name is not.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _opened(func: Callable[..., Any]) -> Callable[..., Any]:
    globals_ = {**func.__globals__, "has_torch_function": lambda arguments: False}
    return types.FunctionType(func.__code__, globals_, func.__name__, func.__defaults__)


_ATTENTION = _opened(F.multi_head_attention_forward)


def expanded(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The body of a composite function, or None for every other."""
    if func is F.multi_head_attention_forward:
        return _ATTENTION
    return torch.unflatten if func is Tensor.unflatten else None
