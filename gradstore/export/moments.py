"""The optimizer's Adam moments, by parameter name: read, saved, loaded, hashed.

By name, because the order of parameters in an optimizer differs between launchers and wrappers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradstore.capture.slots import ParameterSlot, parameter_name
from gradstore.errors import BadInput, DamagedData, expect
from gradstore.export.zero_moments import SpreadMoments, is_spread
from gradstore.format.foreign import read_json
from gradstore.storage.replace import replace_file

_FORMAT = "dataflex-adam-moments-1"
_WITHOUT_MOMENTS = "take gradient_type `sgd` or `sign`, which need no moments"


@dataclass(frozen=True)
class AdamConstants:
    """Constants that Adam's step depends on, beside gradient and moments.

    Attributes:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        step: how many steps the optimizer has taken on this parameter.
    """

    beta1: float
    beta2: float
    eps: float
    step: int


@dataclass(frozen=True)
class ParameterMoments:
    """One parameter's moments `m` and `v`, float32 of the parameter's shape, and its constants."""

    m: Tensor
    v: Tensor
    constants: AdamConstants


@dataclass(frozen=True)
class AdamMoments:
    """Adam moments of a model's parameters, by name (without `module.` and `_orig_mod.`).

    Attributes:
        parameters: the moments by parameter name.
    """

    parameters: Mapping[str, ParameterMoments]

    @classmethod
    def from_optimizer(cls, optimizer: Any, model: nn.Module) -> Self:  # noqa: ANN401 - wrappers
        """Copy the moments out of an optimizer; zeros if it has not stepped yet.

        Under DeepSpeed's ZeRO-1 and ZeRO-2 they are put together from all processes, each of which
        has to call this.

        Args:
            optimizer: a torch optimizer of the Adam family, or accelerate's wrapper of one, or of
                DeepSpeed's.
            model: the model whose parameters it updates.

        Raises:
            BadInput: the optimizer keeps no `exp_avg` and `exp_avg_sq`, or not in the parameter's
                shape.
        """
        inner = _unwrapped(optimizer)
        fits = hasattr(inner, "param_groups") and hasattr(inner, "state")
        expect(fits, "optimizer", optimizer, "a torch optimizer of the Adam family")
        groups = {id(p): group for group in inner.param_groups for p in group["params"]}
        spread = SpreadMoments(optimizer) if any(map(is_spread, model.parameters())) else None
        found: dict[str, ParameterMoments] = {}
        for raw_name, parameter in model.named_parameters():
            if spread is not None and is_spread(parameter):
                group, state = spread.group, spread.state_of(parameter)
            elif id(parameter) in groups:
                group, state = groups[id(parameter)], inner.state.get(parameter, {})
            else:
                continue
            name = parameter_name(raw_name)
            found[name] = _read(name, parameter, group, state, type(inner).__name__)
        return cls(found)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> Self:
        """Read a saved `optimizer.state_dict()`, whose parameters have numbers, not names.

        Args:
            state: with `state` and `param_groups`.
            parameters: (name, parameter) in the order the optimizer was given them.

        Raises:
            BadInput: numbers, shapes or the optimizer's kind do not fit.
        """
        fits = isinstance(state, Mapping) and {"state", "param_groups"} <= set(state)
        expect(fits, "state", state, "what optimizer.state_dict() returns")
        named = all(isinstance(pair, tuple) and len(pair) == 2 for pair in parameters)
        expect(named, "parameters", parameters, "pairs (name, parameter): model.named_parameters()")
        groups = {i: group for group in state["param_groups"] for i in group["params"]}
        if len(groups) != len(parameters):
            raise BadInput(
                f"the optimizer state has {len(groups)} parameters, the model trains "
                f"{len(parameters)}: use the state saved beside this same adapter"
            )
        found = {}
        for number, (raw_name, parameter) in zip(sorted(groups), parameters, strict=True):
            name = parameter_name(raw_name)
            inner = state["state"].get(number, {})
            found[name] = _read(name, parameter, groups[number], inner, "state")
        return cls(found)

    def of(self, slot: ParameterSlot) -> ParameterMoments:
        """Return the moments of a slot.

        Raises:
            BadInput: there are none for this name, or they have another shape.
        """
        moments = self.parameters.get(slot.name)
        if moments is None:
            known = ", ".join(sorted(self.parameters)[:3]) or "none at all"
            raise BadInput(
                f"no Adam moments for parameter {slot.name}; there are {len(self.parameters)} "
                f"({known}, ...): use moments saved by a run of this same adapter, or "
                + _WITHOUT_MOMENTS
            )
        if tuple(moments.m.shape) != slot.shape:
            raise BadInput(
                f"Adam moments of parameter {slot.name} have shape {tuple(moments.m.shape)}, the "
                f"parameter has {slot.shape}: use moments saved by a run of this same adapter"
            )
        return moments

    def step_scale(self, slots: Sequence[ParameterSlot]) -> Tensor:
        """Return what Adam's next step multiplies a gradient with, momentum left out.

        1 / (sqrt(beta2 v / (1 - beta2^(step + 1))) + eps), to first order in the gradient (OPUS,
        arXiv 2602.05400, preconditions with v as it is). A coordinate that has had no gradient yet,
        v = 0, counts nothing: its factor, 1 / eps, would drown all others. Before the first step
        all are 1.

        Args:
            slots: where each parameter stands in the whole gradient of p coordinates.

        Returns:
            (p,) float32 on the CPU.

        Raises:
            BadInput: a parameter has no moments.
        """
        found = torch.zeros(sum(slot.numel for slot in slots))
        for slot in slots:
            moments = self.of(slot)
            constants, v = moments.constants, moments.v.reshape(-1).double().cpu()
            corrected = constants.beta2 * v / (1.0 - constants.beta2 ** (constants.step + 1))
            factor = torch.where(v > 0, 1.0 / (corrected.sqrt() + constants.eps), 0.0)
            found[slot.start : slot.start + slot.numel] = factor.float()
        return found if bool(found.any()) else torch.ones_like(found)

    def sha256(self) -> str:
        """Hash names, shapes, constants and values, independent of where and how they are saved."""
        digest = hashlib.sha256()
        for name in sorted(self.parameters):
            moments = self.parameters[name]
            head = [name, list(moments.m.shape), asdict(moments.constants)]
            digest.update(json.dumps(head, sort_keys=True).encode())
            for tensor in (moments.m, moments.v):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically.

        Raises:
            StoreIOError: the file cannot be written.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        constants: dict[str, Any] = {}
        for name, moments in self.parameters.items():
            tensors[f"m.{name}"] = moments.m.detach().cpu().contiguous()
            tensors[f"v.{name}"] = moments.v.detach().cpu().contiguous()
            constants[name] = asdict(moments.constants)
        metadata = {_FORMAT: json.dumps(constants, sort_keys=True)}
        replace_file(Path(path), save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save`.

        Raises:
            BadInput: there is no such file, or it is no file of moments.
            DamagedData: its parts do not fit together.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise BadInput(
                f"no Adam moments at {path}: save them beside each checkpoint "
                "or take `sgd` or `sign`, which need none"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise DamagedData(
                f"{path} is not a whole safetensors file: {error}. "
                "Take another checkpoint, or `sgd` or `sign`"
            ) from error
        if _FORMAT not in metadata:
            raise BadInput(
                f"{path} holds no Adam moments: its metadata has no {_FORMAT!r}; "
                "name a file that AdamMoments.save wrote"
            )
        return cls(dict(_parse(Path(path), metadata[_FORMAT], tensors)))


def _unwrapped(optimizer: Any) -> Any:  # noqa: ANN401
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def _read(
    name: str,
    parameter: nn.Parameter,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    kind: str,
) -> ParameterMoments:
    has_moments = "exp_avg" in state and "exp_avg_sq" in state
    if not {"betas", "eps"} <= group.keys() or (state and not has_moments):
        raise BadInput(
            f"optimizer {kind} keeps no exp_avg and exp_avg_sq for parameter {name}: "
            + _WITHOUT_MOMENTS
        )
    shape = tuple(parameter.shape)
    pair = [torch.zeros(shape), torch.zeros(shape)]
    if has_moments:
        for index, key in enumerate(("exp_avg", "exp_avg_sq")):
            value = state[key]
            if tuple(value.shape) != shape:
                raise BadInput(
                    f"{key} of parameter {name} has shape {tuple(value.shape)}, the parameter has "
                    f"{shape}: sharded or flattened optimizer states are not supported, "
                    + _WITHOUT_MOMENTS
                )
            pair[index] = value.detach().to("cpu", torch.float32, copy=True)
    constants = AdamConstants(
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        step=int(state.get("step", 0)),
    )
    return ParameterMoments(pair[0], pair[1], constants)


def _parse(
    path: Path, text: str, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, ParameterMoments]]:
    try:
        constants: dict[str, dict[str, Any]] = read_json(text)
        expected: Iterable[str] = {f"{part}.{name}" for name in constants for part in "mv"}
        if set(expected) != set(tensors):
            odd = sorted(set(expected) ^ set(tensors))
            raise DamagedData(
                f"{path}: header and tensors disagree on {odd[0]}. "
                "Take another checkpoint, or `sgd` or `sign`"
            )
        for name, values in constants.items():
            m, v = tensors[f"m.{name}"], tensors[f"v.{name}"]
            if m.shape != v.shape or not m.dtype == v.dtype == torch.float32:
                raise DamagedData(
                    f"{path}: m and v of {name} are not a pair of float32 tensors. "
                    "Take another checkpoint, or `sgd` or `sign`"
                )
            yield name, ParameterMoments(m, v, AdamConstants(**values))
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedData(
            f"{path}: its header does not parse: {error}. "
            "Take another checkpoint, or `sgd` or `sign`"
        ) from error
