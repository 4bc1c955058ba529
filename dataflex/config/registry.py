"""(kind, name) -> class: strategies by their names, and the parameters that they accept.

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
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dataflex.config.parameters import BadParameter, Declaration, declared, faults, group
from dataflex.config.sources import registered
from gradstore.errors import BadInput

C = TypeVar("C", bound=type)
G = TypeVar("G")

#: train_type -> (bucket of components.yaml, kind in the registry).
KINDS: Mapping[str, tuple[str, str]] = {
    "dynamic_select": ("selectors", "selector"),
    "dynamic_mix": ("mixers", "mixer"),
    "dynamic_weight": ("weighters", "weighter"),
    "dynamic_reorder": ("reorders", "reorder"),
    "dynamic_lego": ("pipelines", "pipeline"),
}

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

#: Names that a message lists; of more it names the nearest.
MOST_LISTED = 40

_log = logging.getLogger(__name__)
_classes: dict[tuple[str, str], type] = {}


def register(kind: str, name: str) -> Callable[[C], C]:
    """Register a strategy class as `name`, as a decorator; registering a name twice fails."""

    def remember(cls: C) -> C:
        if (kind, name) in _classes:
            raise ValueError(f"{kind} {name!r} is already {_classes[kind, name].__qualname__}")
        _classes[kind, name] = cls
        return cls

    return remember


def strategies(kind: str) -> dict[str, type]:
    """List every registered strategy of `kind`, by name, sorted."""
    package = importlib.import_module(PACKAGES[kind])
    for module in sorted(Path(str(package.__file__)).parent.glob("*.py")):
        if module.stem not in {"__init__", "base"}:
            importlib.import_module(f"{package.__name__}.{module.stem}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except (
            Exception
        ) as error:  # a third-party package may raise anything; our strategies must keep working
            _log.warning(
                "entry point %s of %s cannot be loaded: %s", entry.name, entry.value, error
            )
    return {name: cls for (k, name), cls in sorted(_classes.items()) if k == kind}


def declared_names(kind: str) -> Mapping[str, frozenset[str] | None] | None:
    """List the strategies of `kind` and the parameters of each by their source, importing none.

    Returns:
        Names of parameters by strategy, None for one that takes any; None where an installed
        package may add strategies when it is imported.
    """
    if importlib.metadata.entry_points(group=ENTRY_POINTS):
        return None
    found = {name: cls.parameters() for name, cls in registered(PACKAGES[kind]).items()}
    by_hand = {name: None for (k, name) in _classes if k == kind and name not in found}
    return {**found, **by_hand}


def unknown(what: str, given: Iterable[str], accepted: Iterable[str], listed_by: str = "") -> str:
    """Describe unknown names in one sentence: what each may mean, then what is accepted.

    Args:
        what: the kind of name.
        given: the unknown ones.
        accepted: the known ones; where they are many, the three nearest to each are named instead.
        listed_by: a sentence that says what lists them all.
    """
    names = sorted(accepted)
    few = len(names) <= MOST_LISTED
    parts = []
    for name in sorted(given):
        near = [repr(n) for n in difflib.get_close_matches(name, names, n=1 if few else 3)]
        meant = " or ".join(filter(None, [", ".join(near[:-1]), *near[-1:]]))
        parts.append(f"{name!r}" + (f" (did you mean {meant}?)" if near else ""))
    listed = f"Accepted: {', '.join(names)}." if names else "None is accepted here."
    if not few:
        listed = listed_by or f"{len(names)} are accepted."
    return f"unknown {what}: {', '.join(parts)}. {listed}"


def grouped(cls: type[G], key: str, given: Mapping[str, Any]) -> G:
    """Convert parameters that a user writes under one key to a dataclass that declares them.

    Args:
        cls: the dataclass.
        key: such as pattern_params, for messages.
        given: what stands under it.

    Raises:
        BadParameter: every unknown name and every value refused, one a line.
    """
    known = declared(cls.__init__)
    accepted = list(inspect.signature(cls).parameters)
    found = []
    if extra := set(given) - set(accepted):
        found.append(unknown(key, extra, accepted).removesuffix("."))
    found += [f"{key}.{fault}" for fault in faults(known, given)]
    if found:
        raise BadParameter("\n".join(found))
    return cls(**given)


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """List the keyword parameters a strategy's constructor accepts.

    Its `**rest` stands for the parameters of the class it is annotated with, or else of the
    constructor it inherits, where there is one.
    """
    found: dict[str, inspect.Parameter] = {}
    for constructor in constructors_of(cls):
        # The first parameter is self, whatever its name.
        for name, p in list(inspect.signature(constructor).parameters.items())[1:]:
            if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}:
                found.setdefault(name, p)
    return found


def declarations(cls: type) -> dict[str, Declaration]:
    """Return the parameters of `parameters(cls)` whose annotations are checked."""
    found: dict[str, Declaration] = {}
    for constructor in reversed(constructors_of(cls)):
        found |= declared(constructor)
    return found


def documentation(cls: type) -> str:
    """Join a strategy's docstring with those of the classes whose parameters it inherits."""
    constructors = constructors_of(cls)
    owners = [c for c in cls.__mro__ if vars(c).get("__init__") in constructors]
    groups = [c for constructor in constructors if (c := group(constructor))]
    return "\n".join(inspect.getdoc(c) or "" for c in dict.fromkeys((cls, *owners, *groups)))


def descriptions(cls: type) -> dict[str, str]:
    """Return the words behind each name under `Args:` in `documentation(cls)`."""
    found: dict[str, str] = {}
    for section in _ARGS.findall(documentation(cls)):
        for name, words in _ENTRY.findall(section):
            found.setdefault(name, " ".join(words.split()))
    return found


#: The `Args:` of a docstring, and an entry there with the lines that it goes on for.
_ARGS = re.compile(r"^Args:\n((?:(?: {4}.*)?(?:\n|\Z))*)", flags=re.M)
_ENTRY = re.compile(r"^ {4}(\w+): (\S.*(?:\n {8}.*)*)", flags=re.M)


def constructors_of(cls: type) -> list[Callable[..., None]]:
    """List the constructors that see a strategy's parameters: each `**rest` leads to the next."""
    found: list[Callable[..., None]] = []
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if base is object or constructor is None:
            continue
        found.append(constructor)
        if (shared := group(constructor)) is not None:
            return [*found, *constructors_of(shared)]
        if not takes_any_name(constructor):
            break
    return found


def takes_any_name(constructor: Callable[..., None]) -> bool:
    """Return whether a constructor has a `**rest`."""
    kinds = [p.kind for p in inspect.signature(constructor).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def imported(target: str, key: str, form: str) -> Any:  # noqa: ANN401 - whatever lies there
    """Import the object `target` names, from an installed package or a file in the current folder.

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
    # A user's code is usually in the current folder, beside the YAML.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the module's own code runs here, and raises anything
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{key} {target!r} cannot be imported: {reason}") from error


def target_of(cls: type) -> str:
    """Return the `target` notation of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def import_target(target: str) -> type:
    """Import the class that a `target` names.

    Raises:
        BadInput: it cannot be imported, or is no class.
    """
    found = imported(target, "target", "package.module:Class")
    if not isinstance(found, type):
        raise BadInput(f"target {target!r} is a {type(found).__name__}, not a class.")
    return found


#: train_types that need to know each row's domain.
BY_DOMAIN = ("dynamic_mix", "dynamic_lego")
