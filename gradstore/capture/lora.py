"""LoRA layers as one operation each, while rows' gradients are taken.

peft adds a layer's low-rank part to its output in three passes over (b, t, out): a product, its
multiple, a sum; and the backward makes as many over (b, t, out) and (b, t, in). On a processor they
are a tenth of a training pass, on a GPU they are most of its launches. Here one matrix product adds
its result to what is there, forwards and backwards, and what both matrices' gradients are made of
is at hand without a hook. What peft computes otherwise (DoRA and other variants, quantised
weights, biases of the matrices, layers that others have hooked) is left to it.

Letters: b batch, t tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gradstore.capture.hooks import HookedModule, HookedPass

#: Where peft's own layer lives; one that another library patched has its forward elsewhere.
_PEFT_LAYER = "peft.tuners.lora.layer"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class LoraLayer:
    """A layer y = W x + s B A x of peft that can run as one operation.

    Attributes:
        module: the layer.
        base: W and its bias.
        down: A (r, in).
        up: B (out, r).
        scale: s.
    """

    module: nn.Module
    base: nn.Linear
    down: HookedModule
    up: HookedModule
    scale: float

    def computing_dtype(self, x: Tensor) -> torch.dtype | None:
        """Return the dtype that peft would compute in, if it is the same for all parts."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        parts = (self.base.weight, self.down.module.weight, self.up.module.weight)
        return x.dtype if all(part.dtype == x.dtype for part in parts) else None


@contextmanager
def fused_layers(
    model: nn.Module, watched: Sequence[HookedModule], current: Callable[[], HookedPass | None]
) -> Iterator[None]:
    """Run a model's plain LoRA layers as one operation each wherever `current` gives a pass.

    Args:
        model: with its adapter; its parameters are frozen meanwhile.
        watched: its LoRA matrices.
        current: gives the pass that gradients are for; None for a forward of its own.
    """
    with ExitStack() as stack:
        for layer in lora_layers(model, watched):
            layer.module.forward = partial(_forward, layer, layer.module.forward, current)
            stack.callback(delattr, layer.module, "forward")
        yield


def lora_layers(model: nn.Module, watched: Sequence[HookedModule]) -> Iterator[LoraLayer]:
    """Find the layers that peft computes as W x + s B A x, of matrices that are watched."""
    matrices = {id(each.module): each for each in watched if each.weight is not None}
    for module in model.modules():
        kind = type(module)
        if (kind.__module__, kind.__name__) != (_PEFT_LAYER, "Linear"):
            continue
        layer: Any = module
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if kind.forward.__module__ != _PEFT_LAYER or len(names) != 1:
            continue
        (name,) = names
        parts = layer.base_layer, layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
        down, up = (matrices.get(id(part)) for part in parts[2:])
        if down is None or up is None or name in layer.lora_variant or not _are_plain(layer, parts):
            continue
        yield LoraLayer(layer, layer.base_layer, down, up, float(layer.scaling[name]))


def _are_plain(layer: nn.Module, parts: tuple[nn.Module, ...]) -> bool:
    """Return whether base, dropout, A and B can be multiplied with without being called."""
    base, dropout, *matrices = parts
    if "forward" in vars(layer) or any("forward" in vars(part) for part in parts):
        return False  # accelerate moves weights there
    if any(getattr(part, hooks) for part in parts for hooks in _HOOKS):
        return False  # DeepSpeed gathers weights there
    if type(base) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return False
    if any(matrix.bias is not None for matrix in matrices):
        return False
    return all(type(each) is nn.Parameter for part in parts for each in part.parameters())


def _forward(
    layer: LoraLayer,
    original: Callable[..., Tensor],
    current: Callable[[], HookedPass | None],
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    seen = current()
    if seen is None or args or kwargs or not torch.is_grad_enabled() or not seen.fits(x):
        return original(x, *args, **kwargs)
    dtype = layer.computing_dtype(x)
    if dtype is None:
        return original(x)
    weights = layer.base.weight, layer.base.bias, layer.down.module.weight, layer.up.module.weight
    call = _Call(layer, seen if seen.expect(layer.down, layer.up) else None, dtype, weights)
    # The lowest layer's input needs no gradient, but its matrices do.
    anchor = torch.empty(0, requires_grad=True)
    result: Tensor = _Fused.apply(x, anchor, call)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
        layer: the layer.
        seen: the pass that waits for gradients; None where the call is not counted.
        dtype: that the call computes in.
        weights: W, its bias, A and B as they were given, so that no cast one is kept.
    """

    layer: LoraLayer
    seen: HookedPass | None
    dtype: torch.dtype
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor]

    def cast(self) -> list[Any]:
        """Return the weights in the dtype of the call."""
        return [None if each is None else each.to(self.dtype) for each in self.weights]


class _Fused(torch.autograd.Function):
    """y = W x + bias + s B A x, all weights frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, call: _Call) -> Tensor:  # noqa: ANN401
        weight, bias, down, up = call.cast()
        flat = x.reshape(-1, x.shape[-1]).to(call.dtype)
        low = _scaled_product(call.layer.scale, flat, down.T)
        result = functional.linear(flat, weight, bias)
        result.addmm_(low, up.T)
        ctx.save_for_backward(x, low)
        ctx.call = call
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        (x, low), call, layer = ctx.saved_tensors, ctx.call, ctx.call.layer
        weight, _, down, up = call.cast()
        flat = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = _scaled_product(layer.scale, flat, up)
        back = None
        if ctx.needs_input_grad[0]:
            back = (flat @ weight).addmm_(low_gradient, down).view(x.shape).to(x.dtype)
        if call.seen is not None:
            call.seen.arrive(layer.up, low, gradient)
            call.seen.arrive(layer.down, x, low_gradient)
        return back, None, None


def _scaled_product(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """Compute scale * left @ right, (n, k) and (k, m), in one launch."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)
