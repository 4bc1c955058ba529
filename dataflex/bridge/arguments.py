"""LlamaFactory's arguments: accepted keys, values of a wrong type, and what they raise."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dataflex.config.parameters import describe
from dataflex.config.sources import SourceField, find_class
from gradstore.errors import BadInput

#: LlamaFactory's stages; each has a workflow of its own.
STAGES = ("pt", "sft", "rm", "dpo", "kto", "ppo")


#: The classes that LlamaFactory parses a training configuration into, in `llamafactory.hparams`.
ARGUMENT_CLASSES = ("DataArguments", "FinetuningArguments", "GeneratingArguments", "ModelArguments",
                    "TrainingArguments")  # fmt: skip


def accepted_keys() -> set[str]:
    """Return every key accepted by LlamaFactory's own training arguments, importing nothing."""
    if os.environ.get("USE_MCA", "0").lower() in ("true", "y", "1"):  # other training arguments
        return {f.name for cls in argument_classes() for f in dataclasses.fields(cls) if f.init}
    return set(described_keys())


def described_keys() -> dict[str, SourceField]:
    """Return the keys of `accepted_keys` with what their source says of each."""
    found: dict[str, SourceField] = {}
    for name in ARGUMENT_CLASSES:
        cls = find_class("llamafactory.hparams", name)
        found |= cls.fields() if cls is not None else {}
    return found


def mistyped(args: Mapping[str, Any]) -> dict[str, str]:
    """Return one sentence per bad value where LlamaFactory wants a number, true/false or a choice.

    Its parser takes any value for any key and fails much later, with a TypeError.
    """
    faults = {}
    for cls in argument_classes():
        for name, hint in get_type_hints(cls).items():
            value = args.get(name)
            if value is not None and (choices := _choices(hint)) and value not in choices:
                faults[name] = f"{name} is {value!r}; choose {describe(Literal[choices])}."
            wanted = set(get_args(hint) or (hint,)) - {type(None)}
            if value is None or not wanted <= {int, float, bool}:
                continue
            if isinstance(value, bool | int | float) and not _unusable(value, wanted):
                continue
            number = "a number" if float in wanted else "a whole number"
            expected = "true or false" if wanted == {bool} else f"{number}, without quotes"
            faults[name] = f"{name} is {value!r}; expected {expected}."
    return faults


def _choices(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 - an annotation
    """Return the values of a `Literal`, or of one that may be None; () for another annotation."""
    options = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return get_args(options[0]) if options else ()


def _unusable(value: float, wanted: set[Any]) -> bool:
    """Return whether a value is a boolean for a number, NaN, or a fraction for a whole number."""
    if isinstance(value, bool):
        return bool not in wanted
    return math.isnan(value) or not (float in wanted or float(value).is_integer())


def argument_classes() -> tuple[Any, ...]:
    """Return the dataclasses that LlamaFactory parses a training configuration into."""
    from llamafactory import hparams

    return tuple(getattr(hparams, name) for name in ARGUMENT_CLASSES)


def device_count() -> int:
    """Return the number of accelerators LlamaFactory would use; 0 on a CPU-only machine."""
    from llamafactory.extras.misc import get_device_count

    return int(get_device_count())


#: What LlamaFactory raises for arguments of a wrong type or value, or that need a missing library.
ARGUMENT_FAULTS = (ValueError, TypeError, ImportError)


@contextlib.contextmanager
def configuration_faults() -> Iterator[None]:
    """Convert LlamaFactory's errors for bad arguments, data and models to `BadInput`."""
    from datasets.exceptions import DatasetsError
    from llamafactory.data import loader
    from llamafactory.train import tuner

    data_faults = (ValueError, RuntimeError, DatasetsError)
    places: list[tuple[Any, str, tuple[type[Exception], ...]]] = [
        (tuner, "get_train_args", ARGUMENT_FAULTS),
        (loader, "_get_merged_dataset", (*data_faults, KeyError)),
        (loader, "_get_preprocessed_dataset", data_faults),
        (loader, "split_dataset", data_faults),
    ]
    loaders: list[tuple[Any, str]] = []
    for stage in STAGES:
        workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
        places.append((workflow, "get_template_and_fix_tokenizer", (ValueError,)))
        loaders += [(workflow, name) for name in ("load_tokenizer", "load_model")]
    with contextlib.ExitStack() as stack:
        for module, name in loaders:
            stack.enter_context(swapped(module, name, naming_model(getattr(module, name))))
        for module, name, faults in places:
            guarded = as_bad_input(getattr(module, name), faults)
            stack.enter_context(swapped(module, name, guarded))
        yield


@contextlib.contextmanager
def swapped(module: Any, name: str, replacement: object) -> Iterator[None]:  # noqa: ANN401
    """Replace a name of a module; it is put back in any case."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


def as_bad_input(
    function: Callable[..., Any], faults: tuple[type[Exception], ...] = (ValueError,)
) -> Callable[..., Any]:
    """Wrap one of LlamaFactory's functions: `faults` that it raises become `BadInput`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        try:
            return function(*args, **kwargs)
        except StopIteration as error:
            raise BadInput("a data set is empty: its file holds no row.") from error
        except faults as error:
            cause = error.__cause__ or error
            reason = f"a row has no {cause}" if isinstance(cause, KeyError) else str(cause)
            raise BadInput(f"LlamaFactory refuses the configuration or data: {reason}") from error

    return wrapped


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Add the data set's name to LlamaFactory's data errors, which do not name it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from error


def naming_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_tokenizer` or `load_model`, whose complaints do not say what was to be loaded."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        try:
            return function(*args, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            (name,) = (a.model_name_or_path for a in args if hasattr(a, "model_name_or_path"))
            reason = " ".join(str(error.__cause__ or error).split())
            raise BadInput(f"model_name_or_path {name!r} cannot be loaded: {reason}") from error

    return wrapped
