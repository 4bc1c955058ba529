"""Gradient -> feature: what the sample would do to, or add to, the optimizer's next step.

With moments m, v, constants β₁, β₂, ε and gradient g of one parameter, let M = β₁m + (1-β₁)g and
V = β₂v + (1-β₂)g². The step is Γ(g) = M/√(V+ε) (`inside`, as the code published with LESS, Xia et
al. 2024, has it) or M/(√V+ε) (`outside`, as Adam itself). Features:

- `adam_marginal`: Γ(g) - Γ(0), what this sample adds to the step if it is all of it;
- `adam_share`: Γ(s g) - Γ(0), s being the sample's share of a step (`gradstore.export.share`);
- `adam`: Γ(g), which shares β₁m with every other sample;
- `sgd`: g, or (H + l I)^-1/2 g with a curvature H (`gradstore.export.kronecker`);
- `sign`: the sign of g.

Letters: b batch, w columns of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from gradkernels import Feature, ProjectionSpec
from gradkernels.features import VECTORS, FeatureKind
from torch import Tensor

from gradstore.capture.chosen import Modules
from gradstore.capture.losses import Targets
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput, expect
from gradstore.export.kronecker import KroneckerFactors
from gradstore.export.moments import AdamMoments, ParameterMoments
from gradstore.export.share import StepShare

Kind = Literal["adam_marginal", "adam_share", "adam", "sgd", "sign"]
EpsMode = Literal["inside", "outside"]

#: Stands in for eps = 0, where a parameter that has never moved would divide 0 by 0.
_TINY = torch.finfo(torch.float32).tiny
#: Keeps s + s₀ above 0; where it is not negligible, an outer eps dominates the sum.
_ROOT_FLOOR = 1e-27
_SIGN = Feature("sign")


@dataclass(frozen=True)
class FeatureSpec:
    """Specification of the feature computed from a gradient.

    Attributes:
        kind: adam_marginal | adam_share | adam | sgd | sign.
        adam_eps_mode: whether eps stands inside the root or outside.
        bias_correction: whether the moments are bias-corrected, at the optimizer's next step.
        share: what a step takes of a row's gradient, for `adam_share`.
        curvature: factors of the metric that gradients are put into, for `sgd`; None for none.
        modules: linear | all | names of modules, the trained parameters of a model without an
            adapter that gradients are taken of (`gradstore.capture.chosen`); the slots of a space
            say which those are.
    """

    kind: Kind = "adam_marginal"
    adam_eps_mode: EpsMode = "inside"
    bias_correction: bool = False
    share: StepShare | None = None
    curvature: KroneckerFactors | None = None
    modules: Modules = "all"

    def __post_init__(self) -> None:
        """Raise BadInput unless the attributes are what they say.

        Raises:
            BadInput: a name is not one of those offered, or an attribute is of another type.
        """
        if isinstance(self.modules, list):
            object.__setattr__(self, "modules", tuple(self.modules))
        words = get_args(get_args(Modules)[0])
        several = isinstance(self.modules, tuple) and all(isinstance(m, str) for m in self.modules)
        wanted = f"{' | '.join(words)}, or a list of names of modules"
        expect(several or self.modules in words, "modules", self.modules, wanted)
        for key, names in (("kind", Kind), ("adam_eps_mode", EpsMode)):
            offered = get_args(names)
            if getattr(self, key) not in offered:
                raise BadInput(f"{key} is {getattr(self, key)!r}; use " + " | ".join(offered))
        fits = isinstance(self.bias_correction, bool)
        expect(fits, "bias_correction", self.bias_correction, "True or False")
        fits = self.share is None or isinstance(self.share, StepShare)
        expect(fits, "share", self.share, "a StepShare, such as expected_share(...) gives")
        fits = self.curvature is None or isinstance(self.curvature, KroneckerFactors)
        expect(
            fits, "curvature", self.curvature, "KroneckerFactors, such as fit_factors(...) gives"
        )
        if self.curvature is not None and self.kind != "sgd":
            raise BadInput(
                f"a curvature is applied to plain gradients, not to feature {self.kind!r}; use sgd"
            )

    @property
    def needs_moments(self) -> bool:
        """Flag for a feature that depends on the optimizer's moments."""
        return self.kind in ("adam_marginal", "adam_share", "adam")

    @property
    def needs_share(self) -> bool:
        """Flag for a feature that depends on the rows of a step and on its clipping."""
        return self.kind == "adam_share"

    def options(self) -> dict[str, Any]:
        """Return the attributes as a record keeps them; share and curvature where there are any."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "adam_eps_mode": self.adam_eps_mode,
            "bias_correction": self.bias_correction,
        }
        if self.share is not None:
            found["share"] = asdict(self.share)
        if self.curvature is not None:
            found["curvature"] = self.curvature.options()
        return found


@dataclass(frozen=True)
class Recipe:
    """The way from gradients to the rows of one generation.

    What `moments` come to on a device, vectors as long as the gradient, is made for the first unit
    and kept as long as the recipe is.

    Attributes:
        features: how a gradient becomes a feature.
        projection: with the effective seed of the generation; its p must equal the model's
            trainable parameters.
        moments: Adam moments by parameter name, where `features` needs them; never changed in
            place, as those of another state are a recipe of their own.
    """

    features: FeatureSpec
    projection: ProjectionSpec
    moments: AdamMoments | None = None
    _maps: dict[tuple[torch.device, tuple[ParameterSlot, ...]], FeatureMap] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raise BadInput unless the parts are what the attributes say.

        Raises:
            BadInput: one is of another type.
        """
        for name, kind in (("features", FeatureSpec), ("projection", ProjectionSpec)):
            given = getattr(self, name)
            expect(isinstance(given, kind), name, given, f"a {kind.__name__}")
        moments = self.moments
        wanted = "AdamMoments, such as AdamMoments.from_optimizer(optimizer, model)"
        expect(moments is None or isinstance(moments, AdamMoments), "moments", moments, wanted)

    def map_of(self, slots: tuple[ParameterSlot, ...], device: torch.device) -> FeatureMap:
        """Return the map of a layout's gradients on a device, the same one every time.

        Raises:
            BadInput: as `FeatureMap`.
        """
        if (device, slots) not in self._maps:
            made = FeatureMap(self.features, slots, self.moments, device=device)
            self._maps[device, slots] = made
        return self._maps[device, slots]


class FeatureMap:
    """Map from gradient blocks to feature blocks, in place.

    Args:
        spec: which feature.
        slots: the gradient's layout.
        moments: the optimizer's moments, where the feature needs them.
        device: where the blocks live.

    Raises:
        BadInput: moments are needed and missing, as a whole or for a parameter.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        slots: Sequence[ParameterSlot],
        moments: AdamMoments | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self._device = torch.device(device)
        self._features: dict[str, Feature] = {}
        self._joined: dict[tuple[ParameterSlot, ...], Feature] = {}
        self._starts = {slot.name: slot.start for slot in slots}
        if spec.needs_moments:
            if moments is None:
                raise BadInput(
                    f"feature {spec.kind!r} needs the optimizer's Adam moments: save them beside "
                    "the checkpoint, or take `sgd` or `sign`"
                )
            for slot in slots:
                self._features[slot.name] = self._prepare(moments.of(slot))

    def apply_(self, slot: ParameterSlot, grad: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Overwrite a block of gradients with features; non-finite values stay non-finite.

        Args:
            slot: whose gradient it is; a parameter's, or a part of it, unless there is a curvature.
            grad: (b, numel) float32.
            tokens: (b,) target tokens of the rows, for features that need their shares.

        Returns:
            The same tensor.

        Raises:
            BadInput: the feature needs shares, and they or the tokens are missing.
        """
        if self.spec.curvature is not None:
            return self.spec.curvature.root_(slot, grad)
        factors = self.factors(tokens)
        if factors is not None:
            grad.mul_(factors[:, None])
        feature = self.of(slot)
        return grad if feature is None else feature.apply_(grad)

    @property
    def kind(self) -> FeatureKind | None:
        """Kind of what `of` returns; None of plain gradients."""
        if self.spec.needs_moments:
            return "adam" if self.spec.kind == "adam" else "adam_marginal"
        return "sign" if self.spec.kind == "sign" else None

    def of(self, slot: ParameterSlot) -> Feature | None:
        """Return what a projection can do to a slot's gradients as it reads them.

        None of plain gradients, and of those that a curvature mixes: `apply_` alone does that.

        Args:
            slot: a parameter's, or a part of it.
        """
        if self.spec.kind == "sign":
            return _SIGN
        feature = self._features.get(slot.name)
        if feature is None or feature.length == slot.numel:
            return feature
        low = slot.start - self._starts[slot.name]
        return feature.part(low, low + slot.numel)

    def join(self, slots: Sequence[ParameterSlot]) -> Feature | None:
        """Return one feature of neighbouring slots, as `of`; each slot's own shares its memory.

        Asked for again, it is the same one.

        Args:
            slots: whole ones, of one `numbers`, each beginning where that before it ends.
        """
        key = tuple(slots)
        if key in self._joined:
            return self._joined[key]
        each = [self.of(slot) for slot in slots]
        first = each[0]
        if len(each) == 1 or first is None or first.length is None:
            return first
        vectors: dict[str, Any] = {
            name: torch.cat([getattr(feature, name) for feature in each])
            for name in VECTORS[first.kind]
        }
        self._joined[key] = joined = replace(first, **vectors)
        low = 0
        for slot in slots:
            self._features[slot.name] = joined.part(low, low + slot.numel)
            low += slot.numel
        return joined

    def numbers(self, slot: ParameterSlot) -> tuple[float, float]:
        """Return what is a number in a slot's feature, and not one for each parameter."""
        feature = self._features.get(slot.name)
        return (0.0, 0.0) if feature is None else (feature.curve, feature.outer)

    def factors(self, tokens: Tensor | None) -> Tensor | None:
        """Return what rows of so many target tokens are multiplied by before `of`: (b,) float32.

        Raises:
            BadInput: the feature needs shares, and they or the tokens are missing.
        """
        return self._shares(tokens) if self.spec.needs_share else None

    def tokens_of(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Count the target tokens (b,) of a batch's rows, where the feature needs them."""
        return Targets.of(batch).counts if self.spec.needs_share else None

    def _shares(self, tokens: Tensor | None) -> Tensor:
        share = self.spec.share
        if share is None or tokens is None:
            raise BadInput(
                f"feature {self.spec.kind!r} needs the rows of a step and the target tokens of "
                "each row: give FeatureSpec.share from gradstore.export.share.expected_share"
            )
        return share.of(tokens.to(self._device))

    def _prepare(self, moments: ParameterMoments) -> Feature:
        """Divide M and √V by 1-β₁, so that M = a + g and V = base + curve·g².

        eps is part of `base` (inside) or `outer`. Vectors are made in float64.
        """
        constants = moments.constants
        m = moments.m.reshape(-1).double()
        v = moments.v.reshape(-1).double()
        c, curve = 1.0 - constants.beta1, 1.0 - constants.beta2
        a, base = constants.beta1 * m, constants.beta2 * v
        if self.spec.bias_correction:
            first = 1.0 - constants.beta1 ** (constants.step + 1)
            second = 1.0 - constants.beta2 ** (constants.step + 1)
            a, c, base, curve = a / first, c / first, base / second, curve / second
        outer = max(constants.eps, _TINY)
        if self.spec.adam_eps_mode == "inside":
            base, outer = base + outer, 0.0
        a, base, curve, outer = a / c, base / c**2, curve / c**2, outer / c
        still = base.sqrt()
        pull = a * curve / (still + outer)
        if outer:
            still = still + _ROOT_FLOOR
        made = {"a": a, "base": base, "still": still, "pull": pull}
        kind = self.kind
        assert kind is not None
        kept = {name: made[name].to(self._device, torch.float32) for name in VECTORS[kind]}
        return Feature(kind, **kept, curve=curve, outer=outer)
