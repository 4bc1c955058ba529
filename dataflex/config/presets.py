"""Presets of components.yaml: a strategy's name in a YAML becomes a class and its parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dataflex.config.documents import at_home, faults_of, read_settings
from dataflex.config.parameters import faults
from dataflex.config.registry import (
    KINDS,
    constructors_of,
    declarations,
    declared_names,
    import_target,
    parameters,
    strategies,
    takes_any_name,
    unknown,
)
from dataflex.config.secrets import keep_secrets
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)


#: Buckets of components.yaml that DataFlex 1.1.0 called otherwise.
OLD_BUCKETS: Mapping[str, str] = {"reorders": "reorderers"}


PACKAGED_PRESETS = Path(__file__).with_name("components.yaml")


#: Parameters of DataFlex 1.1.0 that have no effect here, and why; dropped with a warning.
RETIRED: Mapping[str, str] = {
    "cache_dir": "features live in the gradient store, selections below output_dir",
    "save_interval": "the store writes units of unit_rows rows, 256 by default",
    "score_num_workers": "rows are already tokenised when they are scored",
    "clustering_num_workers": "features are kept in the store and read from there",
}


@dataclass(frozen=True)
class Component:
    """A strategy's class and its merged parameters, checked but not yet built."""

    kind: str
    name: str
    cls: type
    params: Mapping[str, Any]

    def build(self) -> Any:  # noqa: ANN401 - the kind's protocol types the result at the caller
        """Construct the strategy; a parameter out of range is `BadInput` naming it."""
        try:
            return self.cls(**self.params)
        except (TypeError, ValueError, BadInput) as error:
            raise BadInput(f"component {self.name!r}: {error}") from error


def resolve(
    train_type: str,
    component_name: str | None,
    component_params: Mapping[str, Any],
    presets_file: Path | None = None,
    placeholders: Mapping[str, Any] | None = None,
) -> Component:
    """Find the preset, its class and its parameters.

    Args:
        train_type: picks the bucket of presets.
        component_name: key of a preset, or of a registered strategy without one.
        component_params: override the preset's, key by key inside mappings too; `target` names a
            user's own class.
        presets_file: a components.yaml of the user's; the packaged one when None.
        placeholders: the run's keys, which `${key}` in `presets_file` stands for.

    Raises:
        BadInput: unknown preset, strategy or parameter; lists what is accepted.
    """
    kind = KINDS[train_type][1]
    known = strategies(kind)
    presets = presets_of(KINDS[train_type][0], presets_file or PACKAGED_PRESETS, placeholders)
    chosen = _choose(train_type, component_name, component_params, known, presets)
    cls = import_target(chosen.target) if chosen.target is not None else known[chosen.strategy]
    params, name = dict(chosen.params), chosen.component
    for key in set(params) & set(RETIRED) - set(parameters(cls)):
        _log.warning("component %r: %s is ignored: %s", name, key, RETIRED[key])
        del params[key]
    if {"components_cfg_file", "placeholders"} <= set(parameters(cls)):
        # A strategy made of others looks them up where it was found itself.
        params.setdefault("components_cfg_file", str(presets_file or PACKAGED_PRESETS))
        params.setdefault("placeholders", placeholders)
    _check_parameters(name, cls, params)
    return Component(kind, name, cls, params)


def check_names(
    train_type: str,
    component_name: str | None,
    component_params: Mapping[str, Any],
    presets_file: Path | None = None,
    placeholders: Mapping[str, Any] | None = None,
) -> None:
    """Check the names of a component and of its parameters without importing any strategy.

    Args: those of `resolve`, which checks values too.

    Raises:
        BadInput: as `resolve`, but for a user's own class and what it accepts.
    """
    known = declared_names(KINDS[train_type][1])
    if known is None:
        return
    presets = presets_of(KINDS[train_type][0], presets_file or PACKAGED_PRESETS, placeholders)
    chosen = _choose(train_type, component_name, component_params, known, presets)
    accepted = None if chosen.target is not None else known[chosen.strategy]
    if accepted is not None and (extra := set(chosen.params) - accepted - set(RETIRED)):
        raise BadInput(_unknown_parameters(chosen.component, extra, accepted))


def train_types_of(component_name: str, presets_file: Path | None = None) -> list[str]:
    """List the train types that have a component of this name, `dynamic_select` first.

    Args:
        component_name: key of a preset, or of a registered strategy.
        presets_file: a components.yaml of the user's; the packaged one when None.
    """
    path = presets_file or PACKAGED_PRESETS
    return [
        train_type
        for train_type, (bucket, kind) in KINDS.items()
        if component_name in {*presets_of(bucket, path), *strategies(kind)}
    ]


@dataclass(frozen=True)
class _Choice:
    """A component as a configuration and a preset name it: nothing is imported yet."""

    component: str
    strategy: str
    target: str | None
    params: Mapping[str, Any]


def _choose(
    train_type: str,
    component_name: str | None,
    component_params: Mapping[str, Any],
    known: Collection[str],
    presets: Mapping[str, Mapping[str, Any]],
) -> _Choice:
    """Look up a component among the presets of its bucket and the strategies' names, `known`."""
    bucket, kind = KINDS[train_type]
    if component_name is None:
        raise BadInput(
            f"train_type: {train_type} needs component_name. "
            f"Known {bucket}: {', '.join(sorted({*presets, *known}))}."
        )
    if component_name not in presets and component_name not in known:
        raise BadInput(unknown(f"component_name for {train_type}", [component_name],
                               {*presets, *known}))  # fmt: skip
    preset = presets.get(component_name, {"name": component_name})
    where = f"preset {component_name!r} of {bucket}"
    if extra := set(preset) - {"name", "params", "target"}:
        raise BadInput(unknown(f"key in {where}", extra, ("name", "params", "target")))
    if not isinstance(preset.get("params") or {}, Mapping):
        raise BadInput(f"params in {where} is {preset['params']!r}; expected a mapping.")
    params = _over(preset.get("params") or {}, component_params)
    keep_secrets(params)
    target = params.pop("target", preset.get("target"))
    name = str(preset.get("name", component_name))
    if kind == "reorder":  # DataFlex 1.1.0 looked these up by `kind`, whatever their name
        name = str(params.pop("kind", name))
    if target is None and name not in known:
        raise BadInput(unknown(f"strategy `name` in {where}", [name], known))
    return _Choice(component_name, name, None if target is None else str(target), params)


def _over(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Override the preset's parameters with those given, key by key inside mappings too."""
    merged = {**preset, **given}
    for key in set(preset) & set(given):
        if isinstance(preset[key], Mapping) and isinstance(given[key], Mapping):
            merged[key] = {**preset[key], **given[key]}
    return merged


def presets_of(
    bucket: str, path: Path = PACKAGED_PRESETS, placeholders: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Read the presets of a bucket (selectors, mixers, ...) of a components.yaml: name -> settings.

    Args:
        bucket: key at the top of the file.
        path: the file.
        placeholders: what `${key}` stands for; None leaves it as it is.

    Raises:
        BadInput: the file cannot be read, names a placeholder that is none, or the bucket is no
            mapping of mappings.
    """
    if path == PACKAGED_PRESETS:
        content = copy.deepcopy(_packaged_presets())
    else:
        content = _content_of(path, placeholders)
    if not isinstance(content, dict):
        raise BadInput(f"components_cfg_file {str(path)!r} is no mapping of kinds to presets.")
    presets = content.get(bucket) or content.get(OLD_BUCKETS.get(bucket, bucket)) or {}
    if not isinstance(presets, dict) or not all(isinstance(p, dict) for p in presets.values()):
        raise BadInput(f"components_cfg_file {str(path)!r}: {bucket} must map preset -> settings.")
    if bucket == KINDS["dynamic_lego"][0]:
        return {key: _pipeline(preset) for key, preset in presets.items()}
    return presets


@cache
def _packaged_presets() -> Any:  # noqa: ANN401 - a YAML document
    """Read the packaged file, in which no placeholder stands, once in a process."""
    return _content_of(PACKAGED_PRESETS, None)


def _content_of(path: Path, placeholders: Mapping[str, Any] | None) -> Any:  # noqa: ANN401
    """Read a components.yaml as plain values.

    Raises:
        BadInput: it cannot be read, or names a placeholder that is none.
    """
    with faults_of(f"components_cfg_file {str(path)!r}"):
        loaded = read_settings(path)
        if placeholders is None or not OmegaConf.is_dict(loaded):
            content = OmegaConf.to_container(loaded)
        else:
            known = {key: value for key, value in placeholders.items() if key not in loaded}
            content = OmegaConf.to_container(OmegaConf.merge(known, loaded), resolve=True)
        return at_home(content)


def _pipeline(preset: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a pipeline's preset; in DataFlex 1.1.0 its `name` is its own (one kind only)."""
    if "target" in preset:
        return dict(preset)
    params = preset.get("params", {k: v for k, v in preset.items() if k != "name"})
    return {"name": "pipeline", "params": params}


def _check_parameters(name: str, cls: type, params: Mapping[str, Any]) -> None:
    """Refuse unknown parameters, missing ones, and values that the signature does not allow.

    Raises:
        BadInput: every fault found, one per line.
    """
    accepted = parameters(cls)
    constructors = constructors_of(cls)
    found = []
    takes_any = bool(constructors) and takes_any_name(constructors[-1])
    if (extra := set(params) - set(accepted)) and not takes_any:
        found.append(_unknown_parameters(name, extra, accepted))
    if required := {n for n, p in accepted.items() if p.default is p.empty} - set(params):
        found.append(f"component {name!r} needs component_params: {', '.join(sorted(required))}.")
    found += [f"component {name!r}: {fault}." for fault in faults(declarations(cls), params)]
    if found:
        raise BadInput("\n".join(found))


def _unknown_parameters(name: str, extra: Collection[str], accepted: Collection[str]) -> str:
    return unknown(f"component_params of {name!r}", extra, accepted)
