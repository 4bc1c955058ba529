"""One YAML in, two configurations out: DataFlex's own keys and the dict LlamaFactory gets.

Every key is checked before anything is loaded, and all faults are reported together: LlamaFactory
would stop at the first, name no accepted keys, and can be told to ignore misspelt ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dataflex.config.presets import PACKAGED_PRESETS, Component, resolve
from dataflex.config.registry import KINDS, unknown
from gradstore.errors import BadInput

#: train_types that replace the trainer, and the one that leaves LlamaFactory alone.
TRAIN_TYPES = ("static", *KINDS)


@dataclass(frozen=True)
class DataFlexConfig:
    """The keys DataFlex adds to LlamaFactory's (ALGORITHMS 0.6, DESIGN 3).

    Steps are optimizer steps. `None` means "not given".
    """

    train_type: str = "static"
    components_cfg_file: str = "configs/components.yaml"
    component_name: str | None = None
    component_params: Mapping[str, Any] = field(default_factory=dict)
    warmup_step: int = 0
    update_step: int = 0
    update_times: int = 1
    train_step: int = 0
    static_mix: bool = False
    freeze_gate: bool = False
    early_stopping_min_delta: float = 0.0
    mixture_sample_rule: str | None = None
    init_mixture_proportions: Sequence[float] | None = None
    mixer_eval_dataset: Sequence[str] | None = None
    gradstore: str | None = None
    gradstore_run: str | None = None
    gradstore_checkpoints: Sequence[str] | None = None
    target_dataset: Sequence[str] | None = None
    target_subtasks: Sequence[int] | None = None

    @property
    def presets_file(self) -> Path:
        """The components.yaml to read: the user's, or the packaged one.

        Configurations written for DataFlex 1.1.0 name the file inside its own source tree; that
        file is ours now.
        """
        path = Path(self.components_cfg_file)
        packaged = path.parts[-2:] == ("configs", "components.yaml")
        return PACKAGED_PRESETS if packaged and not path.exists() else path


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration.

    Attributes:
        dataflex: our keys.
        llamafactory: every other key, as LlamaFactory's parser takes it.
        path: the file it came from, for messages.
    """

    dataflex: DataFlexConfig
    llamafactory: Mapping[str, Any]
    path: Path

    @property
    def output_dir(self) -> Path:
        """Where LlamaFactory writes the run."""
        return Path(str(self.llamafactory["output_dir"])).expanduser()

    @property
    def store_path(self) -> Path:
        """The gradient store: `gradstore`, or a folder of output_dir."""
        if self.dataflex.gradstore is not None:
            return Path(self.dataflex.gradstore).expanduser()
        return self.output_dir / "gradstore"

    @property
    def owns_store(self) -> bool:
        """Whether the store shares output_dir's fate (`overwrite_output_dir` starts it anew)."""
        return self.dataflex.gradstore is None

    def component(self, train_type: str, name: str | None, params: Mapping[str, Any]) -> Component:
        """A component of the run's presets, in which `${key}` stands for a key of the run.

        Raises:
            BadInput: as `dataflex.config.presets.resolve`.
        """
        keys = {**self.llamafactory, **vars(self.dataflex)}
        return resolve(train_type, name, params, self.dataflex.presets_file, keys)

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - YAML values
        """A LlamaFactory key as the user wrote it, or `default`."""
        value = self.llamafactory.get(key)
        return default if value is None else value


def load(path: Path, overrides: Sequence[str], accepted: Collection[str]) -> RunConfig:
    """Read a YAML or JSON file, apply `key=value` overrides, resolve `${...}`, check every key.

    Args:
        path: the configuration file.
        overrides: `key=value` or `nested.key=value`, as LlamaFactory takes them.
        accepted: the keys LlamaFactory itself knows.

    Raises:
        BadInput: every fault found, one per line.
    """
    merged = _read(path, overrides)
    own = {f.name for f in fields(DataFlexConfig)}
    if extra := set(merged) - own - set(accepted):
        raise BadInput(f"{path}: {unknown('key', extra, own | set(accepted))}")
    faults: list[str] = []
    ours = _converted({k: v for k, v in merged.items() if k in own}, faults)
    rest = {k: v for k, v in merged.items() if k not in own}
    _converted({key: rest.get(key) for key in ("dataset", "eval_dataset")}, faults)
    if not isinstance(rest.get("output_dir"), str) or not rest["output_dir"]:
        faults.append("output_dir is missing: say where the run is written.")
    if ours.get("train_type", "static") not in TRAIN_TYPES:
        faults.append(unknown("train_type", [str(ours["train_type"])], TRAIN_TYPES))
    if faults:
        raise BadInput("\n".join(f"{path}: {fault}" for fault in faults))
    return RunConfig(DataFlexConfig(**ours), rest, path)


def names(value: object) -> tuple[str, ...]:
    """A list or a comma string of names -> a tuple, blanks removed."""
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    return tuple(str(p).strip() for p in parts if str(p).strip())


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if bad := [o for o in overrides if "=" not in o]:
        raise BadInput(f"override {bad[0]!r} is not key=value.")
    try:
        if path.suffix == ".json":
            base = OmegaConf.create(json.loads(path.read_text(encoding="utf-8")))
        else:
            base = OmegaConf.load(path)
        if not isinstance(base, DictConfig):
            raise BadInput(f"{path}: expected a mapping of keys to values at the top.")
        merged = OmegaConf.merge(base, OmegaConf.from_cli(list(overrides)))
        found = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise BadInput(f"configuration {str(path)!r} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"configuration {str(path)!r} cannot be read: {error}") from error
    except (yaml.YAMLError, json.JSONDecodeError, OmegaConfBaseException, TypeError) as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in dict(found).items()}  # type: ignore[arg-type]


def _converted(given: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Check and convert values; a null means the default, as it does for LlamaFactory."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        try:
            values[key] = _CONVERT[key](value)
        except (TypeError, ValueError) as error:
            faults.append(f"{key} is {value!r}; {error}")
    return values


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a whole number.")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("expected a whole number.") from None
    if not number.is_integer():
        raise ValueError("expected a whole number.")
    return int(number)


def _count(value: object) -> int:
    if (number := _integer(value)) < 0:
        raise ValueError("expected 0 or more.")
    return number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number.")
    return float(value)


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false.")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a name or a path.")
    return value


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected a mapping such as {proj_dim: 4096}.")
    return dict(value)


def _listed(value: object) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list):
        return value
    return [value]


def _name_list(value: object) -> tuple[str, ...]:
    return tuple(_text(v) for v in _listed(value))


def _integer_list(value: object) -> tuple[int, ...]:
    return tuple(_integer(v) for v in _listed(value))


def _number_list(value: object) -> tuple[float, ...]:
    return tuple(_number(float(v) if isinstance(v, str) else v) for v in _listed(value))


_CONVERT: Mapping[str, Any] = {
    "train_type": _text,
    "components_cfg_file": _text,
    "component_name": _text,
    "component_params": _mapping,
    "warmup_step": _integer,
    "update_step": _integer,
    "update_times": _integer,
    "train_step": _count,
    "static_mix": _boolean,
    "freeze_gate": _boolean,
    "early_stopping_min_delta": _number,
    "mixture_sample_rule": _text,
    "init_mixture_proportions": _number_list,
    "mixer_eval_dataset": _name_list,
    "gradstore": _text,
    "gradstore_run": _text,
    "gradstore_checkpoints": _name_list,
    "target_dataset": _name_list,
    "target_subtasks": _integer_list,
    # LlamaFactory's, which iterates over whatever they are:
    "dataset": _name_list,
    "eval_dataset": _name_list,
}
