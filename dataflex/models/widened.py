"""A model in float64 all the way: where its code asks for float32, it gets float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Functions that take the type of their result by the keyword `dtype`.
_BY_KEYWORD = frozenset({torch.softmax, torch.nn.functional.softmax, Tensor.softmax,
                         torch.log_softmax, torch.nn.functional.log_softmax, torch.sum, torch.mean,
                         Tensor.sum, Tensor.mean})  # fmt: skip


class Widened(TorchFunctionMode):
    """Context in which what would be converted to float32 is converted to float64.

    Norms and softmax of transformers' models compute in float32 whatever the model's type is. A
    float64 model then has values rounded to float32 in its middle, and a difference quotient with
    a small step measures that rounding.

    Examples:
        >>> with Widened():
        ...     torch.ones(1, dtype=torch.float64).to(torch.float32).dtype
        torch.float64
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's protocol
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call a torch function, with float64 in the place of float32."""
        given = dict(kwargs or {})
        if func is Tensor.float:
            func = Tensor.double
        if func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if (func is Tensor.to or func in _BY_KEYWORD) and given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        return func(*args, **given)
