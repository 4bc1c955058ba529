"""LoRA layers as one operation each, while rows' gradients are taken.

peft adds a layer's low-rank part to its output in three passes over (b, t, out): a product, its
multiple, a sum; and the backward makes as many over (b, t, out) and (b, t, in). On a processor they
are a tenth of a training pass, on a GPU they are most of its launches. Here one matrix product adds
its result to what is there, forwards and backwards, and what both matrices' gradients are made of
is at hand without a hook. What peft computes otherwise (DoRA and other variants, quantised
weights, biases of the matrices, layers that others have hooked) is left to it, and the log says so
once for each reason.

Letters: b batch, t tokens, r rank.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from gradstore.capture.adapters import HookedModule
from gradstore.capture.hooks import HookedPass
from gradstore.capture.siblings import Place

_log = logging.getLogger(__name__)

#: Where peft's own layer lives; one that another library patched has its forward elsewhere.
_PEFT_LAYER, _TORCH_LAYER = "peft.tuners.lora.layer", "torch.nn.modules.linear"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class LoraLayer:
    """A layer y = W x + bias + s B A x of peft.

    Attributes:
        module: the layer.
        name: of its adapter.
        down: A (r, in).
        up: B (out, r).
    """

    module: Any
    name: str
    down: HookedModule
    up: HookedModule

    def unlike(self, hooks: int) -> str | None:
        """Tell why its parts can't be multiplied with without being called; None where they can.

        Args:
            hooks: on all parts together, of those that watch the matrices.
        """
        layer, name = self.module, self.name
        if _home(type(layer).forward) != _PEFT_LAYER or _home(nn.Linear.forward) != _TORCH_LAYER:
            return "patched by another library"
        if has_global_hooks():  # type: ignore[no-untyped-call]
            return "hooks on all modules"
        if layer.disable_adapters or layer.merged:
            return "disabled or merged"
        if name in layer.lora_variant:
            return f"a variant of LoRA, {type(layer.lora_variant[name]).__name__}"
        if [each for each in layer.active_adapters if each in layer.lora_A] != [name]:
            return "several adapters"
        matrices = [self.down.module, self.up.module]
        if [layer.lora_A[name], layer.lora_B[name]] != matrices:
            return "matrices put in the place of others"
        return self._unlike_parts(hooks)

    def _unlike_parts(self, hooks: int) -> str | None:
        layer, name = self.module, self.name
        matrices = [self.down.module, self.up.module]
        base, dropout = layer.base_layer, layer.lora_dropout[name]
        drops = dropout.training or not isinstance(dropout, nn.Dropout)
        if type(base) is not nn.Linear:
            return f"base layers of type {type(base).__name__}"
        if drops and type(dropout) is not nn.Identity:
            return "active dropout"
        parts = (base, dropout, *matrices)
        if any("forward" in vars(part) for part in parts):
            return "parts with a forward of their own"  # accelerate moves weights there
        if sum(len(getattr(part, kind)) for part in parts for kind in _HOOKS) != hooks:
            return "hooks on their parts"  # DeepSpeed gathers weights there
        if any(matrix.bias is not None for matrix in matrices):
            return "matrices with a bias"
        if all(type(each) is nn.Parameter for part in parts for each in part.parameters()):
            return None
        return "weights that are no plain parameters"

    def computing_dtype(self, x: Tensor) -> torch.dtype | None:
        """Return the dtype that peft would compute in, if it is the same for all parts."""
        weights = (self.module.base_layer.weight, self.down.module.weight, self.up.module.weight)
        dtypes = {x.dtype, *(weight.dtype for weight in weights)}
        if torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes:
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if len(dtypes) == 1 else None


@contextmanager
def fused_layers(
    model: nn.Module, watched: Sequence[HookedModule], current: Callable[[], HookedPass | None]
) -> Iterator[None]:
    """Run a model's plain LoRA layers as one operation each wherever `current` gives a pass.

    Args:
        model: with its adapter; its parameters are frozen meanwhile.
        watched: its LoRA matrices, each of which gets one hook meanwhile.
        current: gives the pass that gradients are for; None for a forward of its own.
    """
    found, tell = list(_seen_layers(model, watched)), partial(_tell, ref(model))
    for reason, count in Counter(why for _, why in found if why is not None).items():
        tell(reason, f"{count} LoRA layers are")
    with ExitStack() as stack:
        for layer, why in found:
            if layer is not None and why is None:
                ours = partial(_forward, layer, current, tell)
                layer.module.forward = ours
                stack.callback(_put_back, layer.module, ours)
        yield


def lora_layers(model: nn.Module, watched: Sequence[HookedModule]) -> Iterator[LoraLayer]:
    """Find the layers that peft computes as W x + s B A x, of matrices that are watched."""
    for layer, why in _seen_layers(model, watched):
        if layer is not None and why is None:
            yield layer


def _seen_layers(
    model: nn.Module, watched: Sequence[HookedModule]
) -> Iterator[tuple[LoraLayer | None, str | None]]:
    """Find all layers of matrices that are watched, and why one is left to its own forward."""
    matrices = {id(each.module): each for each in watched if each.weight is not None}
    for module in model.modules():
        layer: Any = module
        if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            continue
        if not any(id(matrix) in matrices for matrix in layer.lora_A.values()):
            continue
        kind = type(module)
        if (kind.__module__, kind.__name__) != (_PEFT_LAYER, "Linear"):
            yield None, f"of type {kind.__module__}.{kind.__name__}"
            continue
        if "forward" in vars(module):
            yield None, "patched by another library"
            continue
        for name in layer.active_adapters:
            down, up = (
                matrices.get(id(part[name])) if name in part else None
                for part in (layer.lora_A, layer.lora_B)
            )
            if down is not None and up is not None:
                found = LoraLayer(layer, name, down, up)
                yield found, found.unlike(hooks=0)


#: What was told of a model already.
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _tell(model: ref[nn.Module], why: str, what: str = "LoRA layers are") -> None:
    """Tell of each model once for each reason that layers are left to their own forward."""
    held = model()
    told = set[str]() if held is None else _told.setdefault(held, set())
    if why not in told:
        told.add(why)
        _log.info("%s left to their own forward, which takes more operations than one: %s", what,
                  why)  # fmt: skip


def _home(function: Any) -> str:  # noqa: ANN401 - whatever stands in the place of a method
    """Name the module in which a function was written, whatever it calls itself."""
    return str(getattr(function, "__globals__", {}).get("__name__"))


def _put_back(module: nn.Module, ours: object) -> None:
    """Remove our forward from a layer; one that was put in its place meanwhile stays."""
    if vars(module).get("forward") is ours:
        del module.forward


def _forward(
    layer: LoraLayer,
    current: Callable[[], HookedPass | None],
    tell: Callable[[str], None],
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    original: Callable[..., Tensor] = partial(type(layer.module).forward, layer.module)
    # A compiler would trace the operation, and lose what its backward delivers.
    if torch.compiler.is_compiling() or args or kwargs:
        return original(x, *args, **kwargs)
    seen = current()
    if seen is None or not torch.is_grad_enabled() or not seen.fits(x) or x.is_inference():
        return original(x)
    dtype = layer.computing_dtype(x)
    why = "several dtypes" if dtype is None else layer.unlike(hooks=2)
    if dtype is None or why is not None:
        tell(str(why))
        return original(x)
    base, scale = layer.module.base_layer, float(layer.module.scaling[layer.name])
    weights = base.weight, base.bias, layer.down.module.weight, layer.up.module.weight
    expected = seen.expect(layer.down, layer.up)
    awaited = (seen, seen.join(layer.down, x, dtype)) if expected else None
    call = _Call(layer, awaited, dtype, scale, weights)
    # The lowest layer's input needs no gradient, but its matrices do.
    anchor = torch.empty(0, requires_grad=True)
    result: Tensor = _Fused.apply(x, anchor, call)  # type: ignore[no-untyped-call]
    # Outside of the function: a view that it returns could not be changed in place.
    return result.view(*x.shape[:-1], base.out_features)


@dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
        layer: the layer.
        awaited: the pass that waits for gradients, and A's place in it; None where the call is not
            counted.
        dtype: that the call computes in.
        scale: s.
        weights: W, its bias, A and B as they were given, so that no cast one is kept.
    """

    layer: LoraLayer
    awaited: tuple[HookedPass, Place] | None
    dtype: torch.dtype
    scale: float
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor]

    def cast(self) -> list[Any]:
        """Return the weights in the dtype of the call."""
        return [None if each is None else each.to(self.dtype) for each in self.weights]


class _Fused(torch.autograd.Function):
    """y (n, out) of x (..., in), n tokens in all; its weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, call: _Call) -> Tensor:  # noqa: ANN401
        weight, bias, down, up = call.cast()
        flat = x.reshape(-1, x.shape[-1]).to(call.dtype)
        low = _scaled_product(call.scale, flat, down.T)
        result = functional.linear(flat, weight, bias)
        result.addmm_(low, up.T)
        ctx.save_for_backward(x, low)
        ctx.call = call
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        (x, low), call, layer = ctx.saved_tensors, ctx.call, ctx.call.layer
        weight, _, down, up = call.cast()
        room = None if call.awaited is None else call.awaited[1].room(gradient)
        low_gradient = _scaled_product(call.scale, gradient, up, room)
        back = None
        if ctx.needs_input_grad[0]:
            back = (gradient @ weight).addmm_(low_gradient, down).view(x.shape).to(x.dtype)
        if call.awaited is not None:
            seen, place = call.awaited
            seen.arrive(low, gradient, layer.up)
            seen.arrive_beside(place, x, low_gradient)
        return back, None, None


def _scaled_product(scale: float, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute scale * left @ right, (n, k) and (k, m), in one launch; into `out` if given."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale, out=out)
