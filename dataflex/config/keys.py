"""One YAML in, two configurations out: DataFlex's own keys and the dict LlamaFactory gets.

Every key is checked before anything is loaded, and all faults are reported together: LlamaFactory
would stop at the first, name no accepted keys, and has an option to ignore misspelt ones.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, doc
from omegaconf import DictConfig, OmegaConf

from dataflex.config.documents import at_home, check_form, faults_of, overridden, read_settings
from dataflex.config.known import KnownKeys
from dataflex.config.parameters import converted
from dataflex.config.presets import PACKAGED_PRESETS, Component, check_names, resolve
from dataflex.config.registry import KINDS, unknown
from dataflex.config.secrets import keep_secret, keep_secrets
from dataflex.config.values import (
    ComponentName,
    Name,
    NameList,
    Numbers,
    PathList,
    PathText,
    Whole,
    Wholes,
)
from gradstore.errors import BadInput
from gradstore.storage.location import Location, at_user_home, is_address, location
from gradstore.storage.wire import READ_KEY, WRITE_KEY

#: train_types that replace the trainer, and the one that leaves LlamaFactory alone.
TRAIN_TYPES = ("static", *KINDS)

#: What lists every key.
LISTED_BY = "`dataflex-cli train --help` lists every key."


@dataclass(frozen=True)
class DataFlexConfig:
    """The keys DataFlex adds to LlamaFactory's (ALGORITHMS 0.6, DESIGN 3).

    Steps are optimizer steps. `None` and `()` mean "not given". `load` checks and converts values
    as the annotations say.
    """

    train_type: Name = "static"
    """static, dynamic_select, _mix, _weight, ..."""
    components_cfg_file: PathText = "configs/components.yaml"
    """Presets of your own, as in components.yaml."""
    component_name: ComponentName | None = None
    """Preset or strategy (see `dataflex-cli components`)."""
    component_params: Annotated[Mapping[str, Any], doc("a mapping such as {proj_dim: 4096}")] = (
        field(default_factory=dict)
    )
    """Parameters of the component, over its preset's."""
    warmup_step: Annotated[Whole, Ge(0)] = 0
    """W: steps before the first decision of a stage."""
    update_step: Whole = 0
    """U: steps from one decision to the next."""
    update_times: Whole = 1
    """T: decisions in a stage; a stage is W + U*T steps."""
    train_step: Annotated[Whole, Ge(0)] = 0
    """Steps of the run; 0: num_train_epochs or max_steps."""
    static_mix: bool = False
    """Keep the opening proportions throughout."""
    freeze_gate: bool = False
    """Keep routers (mixture of experts) out of training."""
    early_stopping_min_delta: float = 0.0
    """Least improvement that early_stopping_steps counts."""
    mixture_sample_rule: Name = "mixture"
    """mixture, or fixed: stratified (by rows), uniform."""
    init_mixture_proportions: Numbers | None = None
    """Opening share of each data set, in any scale."""
    mixer_eval_dataset: NameList = ()
    """Held-out sets for mixers that look at them."""
    gradstore: PathText | None = None
    """Gradient store: a folder, s3://BUCKET/PREFIX, https://HOST; default: output_dir/gradstore."""
    gradstore_run: Name | None = None
    """Prefix of the generations that this run writes."""
    store_text: bool = True
    """Keep prompts and responses in the store, to be read."""
    gradstore_checkpoints: PathList = ()
    """Checkpoint folders that `gradstore build` exports."""
    target_dataset: NameList = ()
    """What to become good at; default: eval_dataset."""
    target_subtasks: Wholes | None = None
    """Sizes of the sub-tasks of the one target set."""

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
        """Folder to which LlamaFactory writes the run."""
        return Path(str(self.llamafactory["output_dir"])).expanduser()

    @property
    def store_path(self) -> Location:
        """The gradient store: `gradstore`, or a folder of output_dir."""
        return self.own_store or at_user_home(self.dataflex.gradstore or "")

    @property
    def own_store(self) -> Path | None:
        """The store with output_dir's lifetime, which `overwrite_output_dir` replaces; if any."""
        return self.output_dir / "gradstore" if self.dataflex.gradstore is None else None

    def component(self, train_type: str, name: str | None, params: Mapping[str, Any]) -> Component:
        """Resolve a component of the run's presets, with `${key}` replaced by a key of the run.

        Raises:
            BadInput: as `dataflex.config.presets.resolve`.
        """
        return resolve(train_type, name, params, self.dataflex.presets_file, self._placeholders)

    def check_names(self) -> None:
        """Check the names of the component and of its parameters, before any strategy is imported.

        Raises:
            BadInput: as `dataflex.config.presets.check_names`.
        """
        ours = self.dataflex
        fixed = ours.static_mix and ours.component_name is None  # the static mixer is used
        if ours.train_type != "static" and not fixed:
            check_names(ours.train_type, ours.component_name, ours.component_params,
                        ours.presets_file, self._placeholders)  # fmt: skip

    @property
    def _placeholders(self) -> Mapping[str, Any]:
        """The values by key that `${key}` stands for in a file of presets."""
        return {**self.llamafactory, **vars(self.dataflex)}

    @property
    def store_run(self) -> str:
        """The prefix of this run's generations in the store; "" without one."""
        return self.dataflex.gradstore_run or ""

    @cached_property
    def known(self) -> KnownKeys:
        """LlamaFactory's keys that DataFlex reads, typed, with LlamaFactory's defaults."""
        return KnownKeys.of(self.llamafactory)

    def given(self, keys: Collection[str]) -> dict[str, Any]:
        """Return those of LlamaFactory's `keys` that the user set to more than null or false."""
        return {key: self.llamafactory[key] for key in keys if self.llamafactory.get(key)}

    def shown(self, key: str) -> str:
        """Return a LlamaFactory key's value for a message, as the user wrote it: 3, not '3'."""
        value = self.llamafactory.get(key)
        return repr(getattr(self.known, key) if value is None else value)

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - YAML values
        """Return any LlamaFactory key as the user wrote it, or `default`; for custom strategies.

        DataFlex itself reads `known`.
        """
        value = self.llamafactory.get(key)
        return default if value is None else value


def load(path: Path, overrides: Sequence[str], accepted: Collection[str]) -> RunConfig:
    """Read a YAML or JSON file, apply `key=value` overrides, resolve `${...}`, check every key.

    Args:
        path: the configuration file.
        overrides: `key=value` or `nested.key=value`; see `documents.overridden`.
        accepted: the keys LlamaFactory itself knows.

    Raises:
        BadInput: every fault found, one per line.
    """
    merged = _read(path, overrides)
    keep_secrets(merged)
    for key in filter(None, map(os.environ.get, (READ_KEY, WRITE_KEY))):
        keep_secret(key)
    own = {f.name for f in fields(DataFlexConfig)}
    if extra := set(merged) - own - set(accepted):
        raise BadInput(f"{path}: {unknown('key', extra, own | set(accepted), LISTED_BY)}")
    ours, refused = converted(DataFlexConfig, merged)
    rest = {k: v for k, v in merged.items() if k not in own}
    faults = [*refused.values(), *converted(_DataSets, rest)[1].values()]
    if not isinstance(rest.get("output_dir"), str) or not rest["output_dir"]:
        faults.append("output_dir is missing: set it to the folder that the run writes.")
    else:
        faults += _place_faults(rest["output_dir"], ours.get("gradstore"))
    if ours.get("train_type", DataFlexConfig.train_type) not in TRAIN_TYPES:
        faults.append(unknown("train_type", [ours["train_type"]], TRAIN_TYPES))
    if faults:
        raise BadInput("\n".join(f"{path}: {fault}" for fault in faults))
    return RunConfig(DataFlexConfig(**ours), rest, path)


def _place_faults(output_dir: str, gradstore: str | None) -> list[str]:
    """Say what is wrong with where the run is to write."""
    if is_address(output_dir):
        return [
            f"output_dir is {output_dir!r}; expected a folder of this machine: a run writes its "
            "checkpoints there. Its features alone may lie elsewhere: "
            "gradstore=s3://BUCKET/PREFIX, or gradstore=https://HOST."
        ]
    try:
        location(gradstore or output_dir)
    except BadInput as error:
        return [f"gradstore: {error}."]
    return []


@dataclass(frozen=True)
class _DataSets:
    """Keys that LlamaFactory iterates over whatever they are."""

    dataset: NameList | None = None
    eval_dataset: NameList | None = None


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    check_form(overrides)
    with faults_of(f"configuration {str(path)!r}"):
        base = read_settings(path)
        if not isinstance(base, DictConfig):
            raise BadInput(f"{path}: expected a mapping of keys to values at the top.")
        found = OmegaConf.to_container(overridden(base, overrides), resolve=True)
        return {str(key): at_home(value) for key, value in dict(found).items()}  # type: ignore[arg-type]
