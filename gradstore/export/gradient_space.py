"""The gradient features of one model: what makes them comparable, and the record of each export."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from gradkernels import ProjectionSpec, canary
from gradkernels.spec import MAX_P
from torch import nn

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot, parameter_name
from gradstore.errors import BadInput
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.moments import AdamMoments
from gradstore.export.settings import GradientSettings
from gradstore.format.names import GenerationName
from gradstore.format.records import GenerationRecord
from gradstore.storage.hashing import tensor_hash


def effective_seed(base: int, step: int) -> int:
    """Derive the projection seed of one checkpoint, so noise averages out over checkpoints."""
    digest = hashlib.blake2b(f"{base}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class GradientSpace:
    """The gradient features of one model.

    Attributes:
        slots: the trained parameters whose gradients are taken, in gradient order.
        projection: with the base seed.
        dtype: of stored training rows.
        left_out: names of trained parameters whose gradients are not taken; they change from step
            to step, so that a state of the model is told by them as well.
    """

    slots: Sequence[ParameterSlot]
    projection: ProjectionSpec
    dtype: str
    left_out: Sequence[str] = ()

    @classmethod
    def of(cls, model: nn.Module, settings: GradientSettings) -> Self:
        """Find what a model trains.

        Raises:
            BadInput: the model has more than one active adapter, or nothing to train, or more
                parameters than a projection numbers.
        """
        with GradientCapture(model, settings.gradient_modules) as capture:
            if capture.p > MAX_P:
                raise BadInput(
                    f"the gradient of {capture.p:,} parameters is longer than a projection takes, "
                    f"{MAX_P:,}: train a LoRA adapter, or fewer layers (finetuning_type freeze)"
                    + (", or set gradient_modules: linear." if not capture.left_out else ".")
                )
            projection = settings.projection(capture.p)
            return cls(capture.slots, projection, settings.dtype, capture.left_out)

    @property
    def trained(self) -> list[str]:
        """Names of everything that the model trains."""
        return [*(slot.name for slot in self.slots), *self.left_out]

    def fields(
        self,
        model: nn.Module,
        *,
        tokenizer: str | None,
        template: str,
        stage: str,
        rows: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of the space.

        Args:
            model: the model in training.
            tokenizer: its hash; None where the rows' origin is unknown.
            template: name or hash of the chat template.
            stage: sft or pt.
            rows: settings that decide which tokens a row has.
        """
        parameters, trained = named_parameters(model), set(self.trained)
        projection = self.projection
        return {
            "dim": projection.d,
            "dtype": self.dtype,
            "loss": "sum over rows of each row's mean over its target tokens",
            "projection": {**projection.to_dict(), "canary": canary(projection).tolist()},
            "parameters": [
                f"{s.name} {list(s.shape)} {str(parameters[s.name].dtype).removeprefix('torch.')}"
                for s in self.slots
            ],
            "base_model": tensor_hash((n, p) for n, p in parameters.items() if n not in trained),
            "tokenizer": tokenizer,
            "template": template,
            "stage": stage,
            "rows": dict(rows),
        }

    def recipe(self, features: FeatureSpec, step: int, moments: AdamMoments | None) -> Recipe:
        """Return the way from gradients to the features of one checkpoint's generation."""
        projection = self.projection
        if projection.method != "trak":  # whose matrix is that of the seed given, as LESS has it
            projection = projection.with_seed(effective_seed(projection.seed, step))
        return Recipe(features, projection, moments)

    def record(
        self,
        model: nn.Module,
        name: GenerationName,
        recipe: Recipe,
        *,
        run_id: str,
        autocast: str,
        learning_rate: float | None,
        options: Mapping[str, Any],
    ) -> GenerationRecord:
        """Record what makes a generation at the model's present state.

        Args:
            model: the model in training.
            name: role, set, step and prefix of the run.
            recipe: from `recipe`.
            run_id: the same for a run and its resumes.
            autocast: dtype name of mixed precision, or "off".
            learning_rate: mean since the previous generation of training rows.
            options: what the features depend on beside model, rows and recipe.
        """
        moments = recipe.moments
        return GenerationRecord(
            name=str(name),
            role=name.role,
            step=name.step,
            set=name.set,
            run_id=run_id,
            adapter_hash=adapter_hash(model, self.trained),
            optimizer_hash=moments.sha256() if moments is not None else None,
            effective_seed=recipe.projection.seed,
            autocast=autocast,
            attention=attention_of(model),
            projection=recipe.projection.to_dict(),
            feature=recipe.features.kind,
            feature_options={**recipe.features.options(), **options},
            learning_rate=learning_rate,
            libraries=libraries(),
        )


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention implementation; it moves features by rounding."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))


def adapter_hash(model: nn.Module, trained: Iterable[str]) -> str:
    """Compute the sha256 of the trained parameters' names and values, in the model's order."""
    names = set(trained)
    return tensor_hash((n, p) for n, p in named_parameters(model).items() if n in names)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters by the names the store uses (wrappers' prefixes stripped)."""
    return {parameter_name(name): p for name, p in model.named_parameters()}


def libraries() -> dict[str, str]:
    """Return library and GPU versions; a difference in them only causes a warning."""
    found = {}
    for name in ("torch", "transformers", "peft", "zarr"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a store needs no transformers
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def tokenizer_hash(tokenizer: Any) -> str:  # noqa: ANN401 - whatever saves itself to files
    """Compute the sha256 of the files a tokenizer saves, chat template included.

    Where it was loaded from and what it was last called with are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        _as_loaded(tokenizer).save_pretrained(folder)
        digest = hashlib.sha256()
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                if path.name == "tokenizer_config.json":
                    content = _without_place(content)
                digest.update(f"{path.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _as_loaded(tokenizer: Any) -> Any:  # noqa: ANN401
    """Return a tokenizer without the cut and the padding of its last call, which it would save."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (backend.truncation is None and backend.padding is None):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _without_place(content: bytes) -> bytes:
    settings: dict[str, Any] = json.loads(content)
    for name in ("name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file"):
        settings.pop(name, None)
    # Written by transformers since 5: fixed, not left out, so that stores of before compare.
    for name in settings.keys() & {"is_local", "local_files_only"}:
        settings[name] = True
    return json.dumps(settings, sort_keys=True).encode()
