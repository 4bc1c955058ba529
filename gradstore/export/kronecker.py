"""Curvature of LoRA matrices in Kronecker products, K-FAC and EK-FAC, and gradients in its metric.

A row's gradient of a matrix W (out, in) is the sum over its tokens of g aᵀ, where a (in) enters W
and g (out) is the gradient of what leaves it. `kfac` (Martens and Grosse, arXiv 1503.05671; several
tokens a row as "expand" of Eschenhagen et al., arXiv 2311.00636) takes for the second moment of
these gradients, the Fisher matrix of W,

    H = G ⊗ A with A = mean over tokens of a aᵀ, G = mean over rows of the sum over tokens of g gᵀ,

so that with A = U diag(α) Uᵀ and G = V diag(γ) Vᵀ its eigenvectors are v uᵀ, with eigenvalues γ α.
`ekfac` (George et al., arXiv 1806.03884) keeps the vectors and takes for each eigenvalue the second
moment of the rows' gradients along its vector: of all matrices with these eigenvectors the nearest
to the second moment itself.

A feature is (H + l I)^-1/2 times the gradient, for training and target rows alike, so that the
product of two features is the influence function with H in the Hessian's place (Koh and Liang,
arXiv 1703.04730, equation 2). The root is the symmetric one: it depends neither on the signs of
eigenvectors nor on which ones span the space of an eigenvalue, so that factors fitted again give
features that are the same but for rounding. l is `damping` times the mean eigenvalue of the
matrix's own block; 0.1 is that of Grosse et al. (arXiv 2308.03296).

A block without any curvature, such as lora_A's while lora_B is zero, has features of zero.

Letters: b rows of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput, DamagedData
from gradstore.format.foreign import read_object
from gradstore.storage.hashing import tensor_hash

Kind = Literal["kfac", "ekfac"]

#: l as a multiple of a block's mean eigenvalue.
DAMPING = 0.1

_FORMAT = "gradstore-kronecker-1"
_PARTS = ("outputs", "inputs", "values")


@dataclass(frozen=True)
class CurvatureRule:
    """The metric that gradients are to be put into.

    Attributes:
        kind: kfac | ekfac.
        damping: l as a multiple of a block's mean eigenvalue, above 0.
    """

    kind: Kind
    damping: float = DAMPING

    def check(self, gradient_type: str) -> None:
        """Refuse features that the metric says nothing about, and a metric that may be singular.

        Raises:
            ValueError: damping of 0 or less, or another gradient_type than sgd.
        """
        if not 0 < self.damping < float("inf"):
            raise ValueError(
                f"damping is {self.damping}, and preconditioner: {self.kind} needs a number above "
                f"0: a block of fewer rows than parameters is singular; {DAMPING} is the usual one"
            )
        if gradient_type != "sgd":
            raise ValueError(
                f"preconditioner: {self.kind} is the curvature of plain gradients, and "
                f"gradient_type: {gradient_type} makes others; set gradient_type: sgd"
            )


@dataclass(frozen=True, eq=False)
class BlockFactors:
    """Eigenvectors and eigenvalues of one parameter's block.

    Attributes:
        outputs: V (out, out) float32, a vector a column; None for the identity.
        inputs: U (in, in) float32; None for the identity.
        values: (out, in) float32, eigenvalues, 0 or more.
    """

    outputs: Tensor | None
    inputs: Tensor | None
    values: Tensor

    def to(self, device: torch.device | str) -> BlockFactors:
        """Return the block on another device."""
        outputs, inputs = (side if side is None else side.to(device)
                           for side in (self.outputs, self.inputs))  # fmt: skip
        return BlockFactors(outputs, inputs, self.values.to(device))

    def along(self, gradients: Tensor) -> Tensor:
        """Turn (b, numel) gradients into coordinates along the eigenvectors, (b, out, in)."""
        found = gradients.reshape(-1, *self.values.shape)
        found = found if self.outputs is None else self.outputs.T @ found
        return found if self.inputs is None else found @ self.inputs

    def rooted(self, gradients: Tensor, damping: float) -> Tensor:
        """Compute (H + l I)^-1/2 g for each of (b, numel) gradients; zeros where H is zero."""
        level = damping * self.values.mean(dtype=torch.float64)
        scale = torch.where(level > 0, (self.values + level).rsqrt(), 0.0)
        found = self.along(gradients) * scale.float()
        found = found if self.outputs is None else self.outputs @ found
        found = found if self.inputs is None else found @ self.inputs.T
        return found.reshape(gradients.shape)


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Factors of every parameter that a model trains, fitted at one state.

    Attributes:
        kind: kfac | ekfac.
        blocks: by parameter name.
        rows: that they were fitted on.
        damping: l as a multiple of a block's mean eigenvalue, above 0; chosen when they are used.
        sample: of which rows: a hash, or "" where nobody says.
    """

    kind: Kind
    blocks: Mapping[str, BlockFactors]
    rows: int
    damping: float = DAMPING
    sample: str = ""

    def to(self, device: torch.device | str) -> KroneckerFactors:
        """Return the factors on another device."""
        moved = {name: block.to(device) for name, block in self.blocks.items()}
        return replace(self, blocks=moved)

    def root_(self, slot: ParameterSlot, gradients: Tensor) -> Tensor:
        """Overwrite (b, numel) gradients of a parameter by (H + l I)^-1/2 times them.

        Raises:
            BadInput: there are no factors for it.
        """
        block = self.blocks.get(slot.name)
        if block is None or block.values.numel() != slot.numel:
            raise BadInput(
                f"no Kronecker factors for parameter {slot.name} of shape {slot.shape}: fit them "
                "to this same adapter"
            )
        return gradients.copy_(block.to(gradients.device).rooted(gradients, self.damping))

    def options(self) -> dict[str, Any]:
        """Return what a record keeps of them."""
        return {
            "kind": self.kind,
            "damping": self.damping,
            "rows": self.rows,
            "sample": self.sample,
            "sha256": self.sha256,
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of kind, names and values; damping is no part of it."""
        return tensor_hash((f"{self.kind} {name}", each) for name, each in self._tensors())

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        from safetensors.torch import save

        tensors = {name: each.cpu().contiguous() for name, each in self._tensors()}
        told = {"kind": self.kind, "rows": self.rows, "sample": self.sample}
        return save(tensors, {_FORMAT: json.dumps(told)})

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Self:
        """Read what `to_bytes` returned.

        Args:
            content: of the file.
            where: the file, for the message.

        Raises:
            DamagedData: it is something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            size = int.from_bytes(content[:8], "little")
            header = read_object(content[8 : 8 + size])
            told = read_object(header["__metadata__"][_FORMAT])
            parts: dict[str, dict[str, Tensor]] = {}
            for key, tensor in load(content).items():
                part, name = key.split(".", 1)
                parts.setdefault(name, {})[part] = tensor
            blocks = {
                name: BlockFactors(found.get("outputs"), found.get("inputs"), found["values"])
                for name, found in parts.items()
            }
            return cls(told["kind"], blocks, told["rows"], sample=told["sample"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedData(
                f"{where} holds no Kronecker factors ({error}): remove it, and fit them again"
            ) from error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, block in sorted(self.blocks.items()):
            for part in _PARTS:
                if (found := getattr(block, part)) is not None:
                    yield f"{part}.{name}", found
