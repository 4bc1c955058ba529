"""Elementwise features of gradients: what a projection may apply to numbers as it reads them.

With a, base, still and pull vectors over the parameters, curve and outer numbers, g a gradient,
s = √(base + curve g²) and D = s + outer:

- "sign": the sign of g;
- "adam": (a + g) / D;
- "adam_marginal": g (s + still - pull g) / (D (s + still)), which is (a + g) / D minus its value
  at g = 0 without the difference of nearly equal terms, if still is s at g = 0 and
  pull = a curve / (still + outer).

`gradstore.export.features` makes the vectors from an optimizer's moments. What is not finite stays
so. The Triton kernels compute the same (`gradkernels.gpu.features`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

FeatureKind = Literal["sign", "adam", "adam_marginal"]
VECTORS: dict[str, tuple[str, ...]] = {
    "sign": (),
    "adam": ("a", "base"),
    "adam_marginal": ("base", "still", "pull"),
}
#: Elements per in-place operation: the block and two work buffers stay in cache.
BLOCK_ELEMENTS = 1 << 17
CUDA_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True, eq=False)
class Feature:
    """Feature of a block of m parameters.

    Attributes:
        kind: "sign", "adam" or "adam_marginal".
        a, base, still, pull: (m,) float32 on the gradients' device; None where the kind has no use
            for it: "adam" takes a and base, "adam_marginal" base, still and pull.
        curve, outer: the two numbers, 0 or more.

    Raises:
        ValueError: the kind is unknown, or a vector is missing, too many or of another form.
    """

    kind: FeatureKind
    a: Tensor | None = None
    base: Tensor | None = None
    still: Tensor | None = None
    pull: Tensor | None = None
    curve: float = 0.0
    outer: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in VECTORS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(get_args(FeatureKind))}")
        takes, shapes = VECTORS[self.kind], set()
        for name in ("a", "base", "still", "pull"):
            vector = getattr(self, name)
            if (vector is not None) != (name in takes):
                raise ValueError(
                    f"{name} is {'given' if name not in takes else 'missing'}: kind={self.kind!r} "
                    f"takes the vectors {', '.join(takes) or 'none'}"
                )
            if vector is not None:
                shapes.add(tuple(vector.shape))
                if vector.dtype != torch.float32 or vector.ndim != 1:
                    raise ValueError(
                        f"{name} is {vector.dtype} {tuple(vector.shape)}; give float32, one number "
                        "a parameter"
                    )
        if len(shapes) > 1:
            raise ValueError(f"vectors have the shapes {sorted(shapes)}; give one length")

    @property
    def length(self) -> int | None:
        """Number of parameters; None of a kind without vectors, which fits any block."""
        return None if self.base is None else len(self.base)

    def part(self, low: int, high: int) -> Feature:
        """Return the feature of parameters [low, high) of the block, as views."""
        given = {name: getattr(self, name)[low:high] for name in VECTORS[self.kind]}
        return replace(self, **given)

    def apply_(self, block: Tensor) -> Tensor:
        """Overwrite a block of gradients (b, m) float32 with features; return it."""
        elements = CUDA_BLOCK_ELEMENTS if block.device.type == "cuda" else BLOCK_ELEMENTS
        width = max(1, elements // max(1, block.shape[0]))
        if self.kind == "sign":
            for piece in torch.split(block, width, dim=1):
                # g - g is 0, or nan where g is not finite: torch.sign would turn nan into 0.
                rest = piece - piece
                piece.sign_().add_(rest)
            return block
        step_ = _step_ if self.kind == "adam" else _marginal_
        work = block.new_empty(2, block.shape[0], min(width, block.shape[1]))
        for low in range(0, block.shape[1], width):
            piece = block[:, low : low + width]
            first, second = work[:, :, : piece.shape[1]]
            step_(piece, self.part(low, low + piece.shape[1]), first, second)
        return block


def _step_(block: Tensor, feature: Feature, root: Tensor, _: Tensor) -> None:
    """Compute (a + g) / D, in place on (b, w)."""
    assert feature.a is not None
    assert feature.base is not None
    torch.addcmul(feature.base, block, block, value=feature.curve, out=root)
    root.sqrt_()
    if feature.outer:
        root.add_(feature.outer)
    block.add_(feature.a).div_(root)


def _marginal_(block: Tensor, feature: Feature, root: Tensor, share: Tensor) -> None:
    """Compute g (s + still - pull g) / (D (s + still)), in place on (b, w)."""
    assert feature.base is not None
    assert feature.still is not None
    assert feature.pull is not None
    torch.addcmul(feature.base, block, block, value=feature.curve, out=root)
    root.sqrt_()
    torch.add(root, feature.still, out=share)
    if feature.outer:
        root.add_(feature.outer)
    root.mul_(share)
    share.addcmul_(feature.pull, block, value=-1.0)
    block.mul_(share.div_(root))
