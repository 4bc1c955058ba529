"""LlamaFactory's arguments: accepted keys, values of a wrong type, and what they raise."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import importlib
import logging
import math
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dataflex.config.parameters import describe
from dataflex.config.sources import SourceField, find_class
from dataflex.data.files import data_files, unreadable
from gradstore.errors import BadInput, StoreError

_log = logging.getLogger(__name__)

#: Keys by which a run is spread over processes.
SPREAD = ("deepspeed", "fsdp")

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

    Its parser takes any value for any key and fails much later, with a TypeError. Annotations are
    read from its source: nothing is imported.
    """
    faults = {}
    for name, field in described_keys().items():
        value, wanted = args.get(name), field.types
        if value is None:
            continue
        if field.choices and value not in field.choices:
            faults[name] = f"{name} is {value!r}; choose {describe(Literal[field.choices])}."
        if not wanted <= {"int", "float", "bool"}:
            continue
        if isinstance(value, bool | int | float) and not _unusable(value, wanted):
            continue
        number = "a number" if "float" in wanted else "a whole number"
        expected = "true or false" if wanted == {"bool"} else f"{number}, without quotes"
        faults[name] = f"{name} is {value!r}; expected {expected}."
    return faults


def _unusable(value: float, wanted: Collection[str]) -> bool:
    """Return whether a value is a boolean for a number, NaN, or a fraction for a whole number."""
    if isinstance(value, bool):
        return "bool" not in wanted
    return math.isnan(value) or not ("float" in wanted or float(value).is_integer())


def argument_classes() -> tuple[Any, ...]:
    """Return the dataclasses that LlamaFactory parses a training configuration into."""
    from llamafactory import hparams

    return tuple(getattr(hparams, name) for name in ARGUMENT_CLASSES)


def device_count() -> int:
    """Return the number of accelerators LlamaFactory would use; 0 on a CPU-only machine."""
    from llamafactory.extras.misc import get_device_count

    return int(get_device_count())


def alone(args: Mapping[str, Any], number: int = 0) -> dict[str, Any]:
    """Return the arguments of one process on one device, the only one that it sees from now on.

    LlamaFactory asks for torchrun where it sees several devices, or settings of DeepSpeed.

    Args:
        args: LlamaFactory's.
        number: of the device among those that are visible, counted over again behind the last. A
            process of torchrun has its own.
    """
    devices = device_count()
    if devices > 1 and "LOCAL_RANK" not in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        os.environ["CUDA_VISIBLE_DEVICES"] = own = visible.split(",")[number % devices]
        _log.info("of %d devices this process takes one, %s", devices, own)
    spread = sorted(key for key in SPREAD if args.get(key))
    if spread:
        _log.info("one process on one device: %s of the YAML without effect", " and ".join(spread))
    return {key: value for key, value in args.items() if key not in SPREAD}


#: Errors of the machine, not of what is loaded: disk, rights, memory.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
           errno.ENOMEM, errno.EMFILE)  # fmt: skip

#: Keys of a model that a message about it does not repeat: its name, and secrets.
UNTOLD = ("model_name_or_path", "hf_hub_token", "ms_hub_token", "om_hub_token", "cache_dir")

#: LlamaFactory's module that makes a loaded model trainable; finetuning_type -> keys it goes by.
ADAPTING = "llamafactory.model.adapter"
TUNING = {
    "lora": ("adapter_name_or_path", "lora_target", "additional_target"),
    "oft": ("adapter_name_or_path", "oft_target", "additional_target"),
    "freeze": ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
}

#: Frames of these packages are ours: an error raised there is a bug of ours.
OURS = ("dataflex", "gradstore", "gradkernels")


@contextlib.contextmanager
def configuration_faults() -> Iterator[None]:
    """Convert LlamaFactory's errors for arguments, data and models to `BadInput`.

    The net lies at two seams, loading data and loading a model, and catches whatever is raised
    there by code that is not ours; nothing lies around training itself.
    """
    from llamafactory.data import loader
    from llamafactory.train import tuner

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (tuner, "get_train_args", as_bad_input(tuner.get_train_args)),
        (loader, "_load_single_dataset", _naming_set(loader._load_single_dataset)),
    ]
    for stage in STAGES:
        workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
        for name in ("get_template_and_fix_tokenizer", "get_dataset"):
            places.append((workflow, name, as_bad_input(getattr(workflow, name))))
        for name in ("load_tokenizer", "load_model"):
            places.append((workflow, name, naming_model(getattr(workflow, name))))
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_templates())
        for module, name, guarded in places:
            stack.enter_context(swapped(module, name, guarded))
        yield


@contextlib.contextmanager
def own_templates() -> Iterator[None]:
    """Let what is loaded inside change LlamaFactory's chat templates for itself alone.

    `default_system`, `tool_format` and `enable_thinking` are written into the process's one
    template of a name, where the next model of a notebook would find them.
    """
    from llamafactory.data import template

    own = {name: copy.copy(each) for name, each in template.TEMPLATES.items()}
    with swapped(template, "TEMPLATES", own):
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


def as_bad_input(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one of LlamaFactory's functions: what it raises, unless it is ours, is `BadInput`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever its libraries raise; ours and the machine's go on
            if is_another_matter(error):
                raise
            raise BadInput(
                f"LlamaFactory refuses the configuration or data: {reason_of(error)}"
            ) from error

    return wrapped


def is_another_matter(error: Exception) -> bool:
    """Return true for errors that are no fault of what is loaded.

    These are failures that have their message, a disk or memory that does not suffice, and bugs of
    ours: whatever is raised by a line of our packages.
    """
    if isinstance(error, StoreError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno in MACHINE:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in OURS


def reason_of(error: BaseException) -> str:
    """Say in one line what the innermost cause of an error complains of."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "none of its rows is left: its files have none, or val_size takes them all."
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | RuntimeError | OSError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _naming_set(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the loading of one data set, whose complaints do not say which one it is."""

    def wrapped(dataset_attr: Any, model_args: Any, data_args: Any, *args: Any) -> Any:  # noqa: ANN401
        name = getattr(dataset_attr, "source_name", dataset_attr.dataset_name)
        entry = {"file_name": dataset_attr.dataset_name} if dataset_attr.load_from == "file" else {}
        with naming(f"data set {name!r}"):
            try:
                return function(dataset_attr, model_args, data_args, *args)
            except Exception as error:  # as in `as_bad_input`
                if is_another_matter(error):
                    raise
                found = map(unreadable, data_files(Path(data_args.dataset_dir), entry))
                reason = next(filter(None, found), None) or reason_of(error)
                raise BadInput(f"LlamaFactory cannot load it: {reason}") from error

    return wrapped


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Add the data set's name to LlamaFactory's data errors, which do not name it."""
    try:
        yield
    except BadInput as error:
        if str(error).startswith("data set "):
            raise
        raise BadInput(f"{what}: {error}") from error


def naming_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_tokenizer` or `load_model`, whose complaints do not say what was to be loaded."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        try:
            return function(*args, **kwargs)
        except Exception as error:  # as in `as_bad_input`
            if is_another_matter(error):
                raise
            (given,) = (a for a in args if hasattr(a, "model_name_or_path"))
            if _raised_in(error, ADAPTING):
                raise BadInput(_unadapted(args, given.model_name_or_path, error)) from error
            told = _set_keys(given)
            raise BadInput(
                f"model_name_or_path {given.model_name_or_path!r} cannot be loaded: "
                f"{reason_of(error)}" + (f" (with {told})" if told else "")
            ) from error

    return wrapped


def _raised_in(error: BaseException, module: str) -> bool:
    """Return whether a line of a module is on an error's way."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == module for frame in frames)


def _unadapted(args: tuple[Any, ...], model: str, error: Exception) -> str:
    """Say which keys do not fit a model that was loaded, and cannot be made trainable."""
    given = {k: v for each in args if dataclasses.is_dataclass(each) for k, v in vars(each).items()}
    kind = str(given.get("finetuning_type"))
    set_here = [key for key in TUNING.get(kind, ()) if given.get(key)]
    keys = [f"{key}: {_listed(given[key])}" for key in set_here] or [f"finetuning_type: {kind}"]
    step = " (lora_target: all takes every linear layer)" if "lora_target" in set_here else ""
    return (
        f"{', '.join(keys)} cannot be set up on the model {model!r}: {reason_of(error)} Correct "
        f"the key{step}."
    )


def _listed(value: Any) -> str:  # noqa: ANN401 - text, a number, a list or a set
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)


def _set_keys(given: Any) -> str:  # noqa: ANN401 - LlamaFactory's ModelArguments
    """List the keys of a model that are not at their defaults, short values alone."""
    defaults = {f.name: f.default for f in dataclasses.fields(given) if f.init}
    set_here = {
        key: getattr(given, key, default)
        for key, default in defaults.items()
        if default is not dataclasses.MISSING and key not in UNTOLD
    }
    return ", ".join(
        f"{key}: {getattr(value, 'value', value)}"
        for key, value in set_here.items()
        if isinstance(value, str | int | float) and value != defaults[key]
    )
