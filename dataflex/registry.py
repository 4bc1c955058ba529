"""(kind, name) -> class: how a strategy's name in a YAML becomes an object.

A strategy is a class decorated with `@register(kind, name)`. A preset in components.yaml names a
strategy and its parameters; `component_params` of the training YAML overrides them. A user's own
class needs no registration: `target: package.module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dataflex.values import mistyped
from gradstore.errors import BadInput

C = TypeVar("C", bound=type)

#: train_type -> (bucket of components.yaml, kind in the registry).
KINDS: Mapping[str, tuple[str, str]] = {
    "dynamic_select": ("selectors", "selector"),
    "dynamic_mix": ("mixers", "mixer"),
    "dynamic_weight": ("weighters", "weighter"),
    "dynamic_reorder": ("reorders", "reorder"),
    "dynamic_lego": ("pipelines", "pipeline"),
}

#: Buckets of components.yaml that DataFlex 1.1.0 called otherwise.
OLD_BUCKETS: Mapping[str, str] = {"reorders": "reorderers"}

#: kind -> package whose modules register its strategies, one strategy a file.
PACKAGES: Mapping[str, str] = {
    "selector": "dataflex.selectors",
    "mixer": "dataflex.mixers",
    "weighter": "dataflex.weighters",
    "reorder": "dataflex.reorders",
    "pipeline": "dataflex.pipelines",
}

#: Entry points by which an installed package adds strategies: each is imported, and registers.
ENTRY_POINTS = "dataflex.components"

PACKAGED_PRESETS = Path(__file__).parent / "configs" / "components.yaml"

#: Parameters of DataFlex 1.1.0 that have nothing left to say here, and why; dropped with a warning.
RETIRED: Mapping[str, str] = {
    "cache_dir": "features live in the gradient store, selections below output_dir",
    "save_interval": "the store writes units of 256 rows",
    "score_num_workers": "rows are already tokenised when they are scored",
    "clustering_num_workers": "features are kept in the store and read from there",
}

_log = logging.getLogger(__name__)
_classes: dict[tuple[str, str], type] = {}


def register(kind: str, name: str) -> Callable[[C], C]:
    """Class decorator that makes a strategy known as `name`; a second claim to a name fails."""

    def remember(cls: C) -> C:
        if (kind, name) in _classes:
            raise ValueError(f"{kind} {name!r} is already {_classes[kind, name].__qualname__}")
        _classes[kind, name] = cls
        return cls

    return remember


def strategies(kind: str) -> dict[str, type]:
    """Every registered strategy of `kind`, by name, sorted."""
    package = importlib.import_module(PACKAGES[kind])
    for module in sorted(Path(str(package.__file__)).parent.glob("*.py")):
        if module.stem not in {"__init__", "base"}:
            importlib.import_module(f"{package.__name__}.{module.stem}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever a stranger's package raises, ours keep working
            _log.warning(
                "entry point %s of %s cannot be loaded: %s", entry.name, entry.value, error
            )
    return {name: cls for (k, name), cls in sorted(_classes.items()) if k == kind}


def unknown(what: str, given: Iterable[str], accepted: Iterable[str]) -> str:
    """One sentence about unknown names: the nearest match first, then all that is accepted."""
    names = sorted(accepted)
    parts = []
    for name in sorted(given):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        parts.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"unknown {what}: {', '.join(parts)}. Accepted: {', '.join(names)}."


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The keyword parameters a strategy's constructor accepts.

    Its `**rest` stands for the parameters of the constructor it inherits, where there is one.
    """
    found: dict[str, inspect.Parameter] = {}
    for constructor in _constructors(cls):
        # The first parameter is self, whatever its name.
        for name, p in list(inspect.signature(constructor).parameters.items())[1:]:
            if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}:
                found.setdefault(name, p)
    return found


def documentation(cls: type) -> str:
    """A strategy's docstring, followed by those of the classes whose parameters it takes over."""
    owners = [c for c in cls.__mro__ if vars(c).get("__init__") in _constructors(cls)]
    return "\n".join(inspect.getdoc(c) or "" for c in dict.fromkeys((cls, *owners)))


def _constructors(cls: type) -> list[Callable[..., None]]:
    """Constructors that see a strategy's parameters: each `**rest` leads to the next one."""
    found: list[Callable[..., None]] = []
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if base is object or constructor is None:
            continue
        found.append(constructor)
        if not _takes_any(constructor):
            break
    return found


def _takes_any(constructor: Callable[..., None]) -> bool:
    kinds = [p.kind for p in inspect.signature(constructor).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


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
    bucket, kind = KINDS[train_type]
    known = strategies(kind)
    presets = presets_of(bucket, presets_file or PACKAGED_PRESETS, placeholders)
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
    target = params.pop("target", preset.get("target"))
    name = preset.get("name", component_name)
    if kind == "reorder":  # DataFlex 1.1.0 looked these up by `kind`, whatever their name
        name = params.pop("kind", name)
    if target is not None:
        cls = _import_target(str(target))
    elif name in known:
        cls = known[name]
    else:
        raise BadInput(unknown(f"strategy `name` in {where}", [str(name)], known))
    for key in set(params) & set(RETIRED) - set(parameters(cls)):
        _log.warning("component %r: %s is ignored: %s", component_name, key, RETIRED[key])
        del params[key]
    if {"components_cfg_file", "placeholders"} <= set(parameters(cls)):
        # A strategy made of others looks them up where it was found itself.
        params.setdefault("components_cfg_file", str(presets_file or PACKAGED_PRESETS))
        params.setdefault("placeholders", placeholders)
    _check_parameters(component_name, cls, params)
    return Component(kind, component_name, cls, params)


def _over(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's parameters with those given over them, key by key inside mappings too."""
    merged = {**preset, **given}
    for key in set(preset) & set(given):
        if isinstance(preset[key], Mapping) and isinstance(given[key], Mapping):
            merged[key] = {**preset[key], **given[key]}
    return merged


def presets_of(
    bucket: str, path: Path = PACKAGED_PRESETS, placeholders: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Presets of a bucket (selectors, mixers, ...) of a components.yaml: name -> settings.

    Args:
        bucket: key at the top of the file.
        path: the file.
        placeholders: what `${key}` stands for; None leaves it as it is.

    Raises:
        BadInput: the file cannot be read, names a placeholder that is none, or the bucket is no
            mapping of mappings.
    """
    import yaml
    from omegaconf import OmegaConf  # reads 1e-5 as a number, as in the run's own YAML
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
        if placeholders is None or not OmegaConf.is_dict(loaded):
            content = OmegaConf.to_container(loaded)
        else:
            known = {key: value for key, value in placeholders.items() if key not in loaded}
            content = OmegaConf.to_container(OmegaConf.merge(known, loaded), resolve=True)
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"components_cfg_file {str(path)!r}: {reason}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"components_cfg_file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"components_cfg_file {str(path)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"components_cfg_file {str(path)!r} is no mapping of kinds to presets.")
    presets = content.get(bucket) or content.get(OLD_BUCKETS.get(bucket, bucket)) or {}
    if not isinstance(presets, dict) or not all(isinstance(p, dict) for p in presets.values()):
        raise BadInput(f"components_cfg_file {str(path)!r}: {bucket} must map preset -> settings.")
    if bucket == KINDS["dynamic_lego"][0]:
        return {key: _pipeline(preset) for key, preset in presets.items()}
    return presets


def _pipeline(preset: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's preset; in DataFlex 1.1.0 its `name` is its own, since there is one kind."""
    if "target" in preset:
        return dict(preset)
    params = preset.get("params", {k: v for k, v in preset.items() if k != "name"})
    return {"name": "pipeline", "params": params}


def imported(target: str, key: str, form: str) -> Any:  # noqa: ANN401 - whatever lies there
    """What `target` names, from an installed package or a file in the current folder.

    Args:
        target: package.module:name.
        key: the YAML key it stands under.
        form: how it should be written.

    Raises:
        BadInput: it is written otherwise, or cannot be imported.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise BadInput(f"{key} is {target!r}; write it as {form}.")
    # A user's code usually lies beside the YAML they run, in the current folder.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the module's own code runs here
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{key} {target!r} cannot be imported: {reason}") from error


def target_of(cls: type) -> str:
    """A class as `target` names it."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _import_target(target: str) -> type:
    found = imported(target, "target", "package.module:Class")
    if not isinstance(found, type):
        raise BadInput(f"target {target!r} is a {type(found).__name__}, not a class.")
    return found


def _check_parameters(name: str, cls: type, params: Mapping[str, Any]) -> None:
    accepted = parameters(cls)
    constructors = _constructors(cls)
    takes_any = bool(constructors) and _takes_any(constructors[-1])
    if (extra := set(params) - set(accepted)) and not takes_any:
        raise BadInput(unknown(f"component_params of {name!r}", extra, accepted))
    required = {n for n, p in accepted.items() if p.default is p.empty} - set(params)
    if required:
        raise BadInput(f"component {name!r} needs component_params: {', '.join(sorted(required))}.")
    owned = {key: value for key, value in params.items() if key in accepted}
    if faults := [f for made in constructors for f in mistyped(made, owned)]:
        raise BadInput("\n".join(f"component {name!r}: {f}." for f in faults))
