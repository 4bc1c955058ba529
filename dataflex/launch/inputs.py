"""Checks that a configuration's model, data sets and output folders exist."""

from __future__ import annotations

import os
from pathlib import Path

from dataflex.bridge import arguments
from dataflex.config.keys import RunConfig
from dataflex.config.known import KnownKeys
from dataflex.config.registry import unknown
from dataflex.data.files import SOURCES, entry_faults, file_faults
from dataflex.models.paths import how_to_bring, missing_folder_faults
from gradstore.errors import BadInput, StoreIOError
from gradstore.format.foreign import read_object
from gradstore.storage.location import ObjectPath
from gradstore.storage.objects_reading import bucket_at
from gradstore.storage.places import reads_at


def check_inputs(config: RunConfig) -> None:
    """Check that values have the right type, model and data sets exist, results can be written.

    Raises:
        BadInput: they do not.
        StoreIOError: they cannot.
    """
    keys = config.llamafactory
    faults = {**KnownKeys.faults(keys), **arguments.mistyped(keys)}
    samples = keys.get("max_samples")
    if isinstance(samples, int) and samples < 1:
        faults["max_samples"] = (
            f"max_samples is {samples}, which leaves no row: set it to at least 1, or remove it."
        )
    if faults:
        raise BadInput("\n".join(f"{config.path}: {fault}" for fault in faults.values()))
    _check_model(config)
    _check_datasets(config)
    _check_writable("output_dir", config.output_dir)
    if config.own_store is None:  # the run's own lies in output_dir; who writes it checks it
        check_store(config)


def check_store(config: RunConfig) -> None:
    """Check that the store of a run can be reached from this machine, and takes writes.

    Raises:
        BadInput: a credential is missing, or what its place needs is not installed.
        StoreIOError: it cannot.
    """
    store = config.store_path
    if isinstance(store, ObjectPath):
        reads_at(store).check_place()
        bucket_at(store).check_writable()
    else:
        _check_writable("gradstore", store)


def _check_model(config: RunConfig) -> None:
    name = config.known.model_name_or_path
    if name is None:
        raise BadInput("model_name_or_path is missing: name a model folder or a hub id.")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if faults := missing_folder_faults("model_name_or_path", name):
            raise BadInput("\n".join(faults))
        return
    try:
        content = read_object((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"model_name_or_path {name!r} has no readable config.json: {error}"
        ) from error
    if "auto_map" in content and not config.known.trust_remote_code:
        raise BadInput(
            f"the model in {name!r} brings its own code (auto_map in config.json). If you "
            "trust it, set trust_remote_code: true; none of it was run."
        )


def _check_datasets(config: RunConfig) -> None:
    """Check that the names of data sets are in a local dataset_info.json."""
    known = config.known
    wanted = {
        "dataset": known.dataset,
        "eval_dataset": known.eval_dataset,
    }
    if config.dataflex.train_type != "static":  # which is LlamaFactory, without keys of ours
        wanted["target_dataset"] = config.dataflex.target_dataset
        wanted["mixer_eval_dataset"] = config.dataflex.mixer_eval_dataset
    folder = known.dataset_dir
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    if known.tokenized_path and not wanted.get("target_dataset"):
        return
    if known.do_train and not wanted["dataset"]:
        raise BadInput("dataset is missing: name at least one training data set.")
    info = Path(folder) / "dataset_info.json"
    try:
        listed = read_object(info.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(
            f"{str(info)!r} does not exist: dataset_dir must hold LlamaFactory's "
            f"dataset_info.json. {how_to_bring(Path(folder)) or 'Correct dataset_dir.'}"
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{str(info)!r} cannot be read: {error}. It must be a JSON object that maps each data "
            "set's name to where its rows are."
        ) from error
    faults = [
        f"{key}: {unknown('data set', missing, listed)} ({info})"
        for key, used in wanted.items()
        if (missing := set(used) - set(listed))
    ]
    for name in sorted({n for used in wanted.values() for n in used} & set(listed)):
        entry = listed[name]
        if not isinstance(entry, dict) or not set(SOURCES) & set(entry):
            faults.append(
                f"data set {name!r}: its entry in {str(info)!r} must be a mapping that says where "
                f"the rows are: {', '.join(SOURCES)}."
            )
            continue
        found = [*entry_faults(entry), *file_faults(Path(folder), entry)]
        faults += [f"data set {name!r}: {fault}" for fault in found]
    if faults:
        raise BadInput("\n".join(faults))


def _check_writable(key: str, path: Path) -> None:
    """Check that the nearest existing folder above `path` is writable."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    reason = ""
    if not folder.is_dir():
        reason = f"{str(folder)!r} is a file"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{str(folder)!r} is read-only for this user"
    if reason:
        raise StoreIOError(f"{key} {str(path)!r} cannot be written: {reason}. Choose another.")
