"""Exact contributions of every module and every token to one row's influence on another.

No projection: the inner product of two whole features is cut into parts that add up to it.

- A **module**'s part is the inner product of its blocks of the two features, whatever they are.
- A **token**'s part is that of its own loss. A row's gradient is the mean over its target tokens,
  g = sum of g_k / T, so a feature that is the gradient itself (`sgd`) is a sum over tokens, and
  token k's part is <g_k / T, other feature>. Tokens without a label have none.
- With a curvature a feature is K g, K symmetric and the same for every row, so that token k's part
  is <g_k / T, K other feature>.
- Other features are no linear function of the gradient. They are written as F(g) = F(0) + r * g,
  element by element, with the secant r = (F(g) - F(0)) / g (0 where g is 0): r depends on the whole
  row, and with it fixed, token k's part is <r * g_k / T, other feature>. What is left, <F(0), other
  feature>, no token of the row brings about: the step that Adam's momentum would take without it.
  It is 0 but for `adam`.

Letters: t tokens of a row, T target tokens, p gradient length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradstore.capture.losses import IGNORED_LABEL, Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.moments import AdamMoments
from gradstore.export.units import Batch

#: Padded tokens of a pass over the tokens of a row.
TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Contributions:
    """Parts of the influence of one training row on one query, at one checkpoint.

    Attributes:
        inner: inner product of the two features.
        norms: lengths of the row's feature and of the query's.
        parameters: parameter name -> part; they add up to `inner`.
        row_tokens: (t,) float64, part of each token of the training row; with `row_rest` they add
            up to `inner`.
        query_tokens: (t,) float64, the same of the query, with `query_rest`.
        row_rest: part that no token of the row brings about.
        query_rest: the same of the query.
    """

    inner: float
    norms: tuple[float, float]
    parameters: Mapping[str, float]
    row_tokens: npt.NDArray[np.float64]
    query_tokens: npt.NDArray[np.float64]
    row_rest: float = 0.0
    query_rest: float = 0.0

    @property
    def cosine(self) -> float:
        """Exact cosine, which a store's projected score estimates."""
        return self.inner / (self.norms[0] * self.norms[1])

    @property
    def modules(self) -> dict[str, float]:
        """Module name -> part, largest first; the two matrices of an adapter are one module."""
        parts: dict[str, float] = {}
        for name, part in self.parameters.items():
            module = module_of(name)
            parts[module] = parts.get(module, 0.0) + part
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    def scaled(self, factor: float) -> Contributions:
        """Return every part times a factor; the norms stay."""
        parameters = {name: part * factor for name, part in self.parameters.items()}
        return Contributions(
            self.inner * factor,
            self.norms,
            parameters,
            self.row_tokens * factor,
            self.query_tokens * factor,
            self.row_rest * factor,
            self.query_rest * factor,
        )


def module_of(parameter: str) -> str:
    """Return the module that a parameter belongs to, without the adapter's own parts.

    Examples:
        >>> module_of("base_model.model.layers.0.q_proj.lora_A.default.weight")
        'layers.0.q_proj'
        >>> module_of("norm.weight")
        'norm'
    """
    name = parameter.removeprefix("base_model.model.")
    head, found, _ = name.partition(".lora_")
    return head if found else name.rpartition(".")[0] or name


class _Side:
    """One of the two rows: its whole feature, and its gradient as a sum over tokens."""

    def __init__(
        self,
        capture: GradientCapture,
        batch: Batch,
        spec: FeatureSpec,
        moments: AdamMoments | None,
        what: str,
    ) -> None:
        targets = Targets.of(batch)
        if targets.grid[0] != 1:
            raise BadInput(f"{what} is a batch of {targets.grid[0]} rows; give one row")
        if not len(targets.columns):
            raise BadInput(f"{what} has no target token, so it has no gradient; give it a response")
        self._curvature = spec.curvature
        self._capture, self._batch, self._columns = capture, batch, targets.columns
        device = targets.columns.device
        whole = FeatureMap(spec, capture.slots, moments, device=device)
        # Without Γ(0), and without the rounding of a difference.
        moved = replace(spec, kind="adam_marginal") if spec.kind == "adam" else spec
        part = FeatureMap(moved, capture.slots, moments, device=device)
        self.feature = torch.zeros(capture.p, device=device)
        self.rest = torch.zeros(capture.p if spec.kind == "adam" else 0, device=device)
        self.secant = torch.zeros(capture.p, device=device)

        tokens = targets.counts

        def sink(slot: ParameterSlot, gradient: Tensor) -> None:
            at = slice(slot.start, slot.start + slot.numel)
            self.feature[at] = whole.apply_(slot, gradient.clone(), tokens)[0]
            if len(self.rest):
                self.rest[at] = whole.apply_(slot, torch.zeros_like(gradient))[0]
            change = part.apply_(slot, gradient.clone(), tokens)
            self.secant[at] = torch.where(gradient == 0, 0.0, change / gradient)[0]

        capture.capture(batch, sink)
        self.norm = float(torch.linalg.vector_norm(self.feature.double()))
        if not np.isfinite(self.norm) or not self.norm:
            state = "is zero" if self.norm == 0 else "has values that are not finite"
            raise BadInput(f"the gradient of {what} {state}: it has no influence to take apart")

    def tokens(self, other: Tensor, token_budget: int) -> npt.NDArray[np.float64]:
        """Compute (t,) float64, each token's part of <feature, other> for (p,) `other`.

        The row is repeated once per target token, each copy with that token's label alone.
        """
        direction = self._direction(other)[None]
        length = self._batch["input_ids"].shape[1]
        found = np.zeros(length)
        copies = max(1, token_budget // length)
        for at in range(0, len(self._columns), copies):
            columns = self._columns[at : at + copies]
            dots = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)

            def sink(slot: ParameterSlot, gradient: Tensor, dots: Tensor = dots) -> None:
                block = direction[:, slot.start : slot.start + slot.numel]
                dots.add_((gradient.double() * block).sum(1))

            self._capture.capture(self._one_label_each(columns), sink)
            # The label at column + 1 is predicted at column.
            found[(columns + 1).cpu().numpy()] = (dots / len(self._columns)).cpu().numpy()
        return found

    def _direction(self, other: Tensor) -> Tensor:
        """Return (p,) float64, the vector whose product with g_k / T is token k's part."""
        curvature = self._curvature
        if curvature is None:
            return self.secant.double() * other.double()
        found = other.clone()
        for slot in self._capture.slots:
            at = slice(slot.start, slot.start + slot.numel)
            found[at] = curvature.root_(slot, other[None, at].clone())[0]
        return found.double()

    def _one_label_each(self, columns: Tensor) -> dict[str, Tensor]:
        """Repeat the row for some of its target positions (k,), each copy with one label."""
        k = len(columns)
        batch = {
            key: value.expand(k, *value.shape[1:]) if _of_one_row(value) else value
            for key, value in self._batch.items()
        }
        labels = torch.full_like(batch["labels"], IGNORED_LABEL)
        places = torch.arange(k, device=columns.device), columns + 1
        labels[places] = batch["labels"][places]
        return {**batch, "labels": labels}


def contributions(
    model: nn.Module,
    row: Batch,
    query: Batch,
    *,
    features: FeatureSpec,
    query_features: FeatureSpec,
    moments: AdamMoments | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Contributions:
    """Take the influence of one training row on one query apart, at the model's present state.

    Costs one pass over each row and one over each target token of both, and keeps five vectors of
    length p for each of the two.

    Args:
        model: the model whose gradients are taken.
        row: one training row, tensors `input_ids`, `labels`, ... (1, t).
        query: one target row, likewise.
        features: how the training row's gradient becomes its feature.
        query_features: the same of the query.
        moments: Adam moments, where a feature needs them.
        token_budget: tokens of a pass over the copies of a row.

    Raises:
        BadInput: a batch of several rows, a row without a target token, or without a gradient that
            is finite and not zero; moments that are missing.
    """
    with GradientCapture(model, features.modules) as capture:
        a = _Side(capture, row, features, moments, "the training row")
        b = _Side(capture, query, query_features, moments, "the query")
        parameters = {
            slot.name: _dot(a.feature, b.feature, slice(slot.start, slot.start + slot.numel))
            for slot in capture.slots
        }
        return Contributions(
            inner=_dot(a.feature, b.feature, slice(None)),
            norms=(a.norm, b.norm),
            parameters=parameters,
            row_tokens=a.tokens(b.feature, token_budget),
            query_tokens=b.tokens(a.feature, token_budget),
            row_rest=_dot(a.rest, b.feature, slice(len(a.rest))),
            query_rest=_dot(b.rest, a.feature, slice(len(b.rest))),
        )


def _dot(left: Tensor, right: Tensor, part: slice) -> float:
    return float(left[part].double() @ right[part].double())


def _of_one_row(value: object) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (1,)
