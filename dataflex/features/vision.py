"""Sources of COINCIDE's features: the vision-language model in training, or a fixed one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex.data.images import TextsWithPictures, pictures_hash, shown_batch
from dataflex.data.rows import Rows
from dataflex.features.embedders import STORED
from dataflex.features.fields import model_identity, row_fields
from dataflex.models.encoders import DECIDING, DTYPES, find_folder
from dataflex.models.passes import longest_row
from dataflex.run.context import RunContext
from dataflex.run.log import OnRows
from gradstore.capture.limits import token_budget
from gradstore.errors import BadInput
from gradstore.export.embeddings import compute_embedding_unit
from gradstore.export.gradient_space import named_parameters, tokenizer_hash
from gradstore.export.room import Room
from gradstore.export.units import Batches
from gradstore.export.visual import VISUAL_KEYS, VisualStates, even_layers, visual_token_ids
from gradstore.storage.hashing import hash_folder_files, tensor_hash

if TYPE_CHECKING:
    from gradstore.export.units import UnitFeatures
    from gradstore.format.plans import UnitRange


@dataclass(frozen=True)
class VisionSettings:
    """Settings of the features, from the parameters of `CoincideSelector`.

    Attributes:
        model: `embedding_model_name_or_path`; None takes the model in training.
        dtype: `embedding_model_dtype`, of a fixed model's weights: auto | fp32 | fp16 | bf16.
        layers: `embedding_layers`, numbers of decoder layers from 0; None takes five, evenly.
        batch_rows: rows of a batch, at most; batches are bounded by tokens as well.
    """

    model: str | None = None
    dtype: str = "auto"
    layers: tuple[int, ...] | None = None
    batch_rows: int = 8


@dataclass(frozen=True)
class Anatomy:
    """Architecture of a vision-language model, as its config describes it.

    Attributes:
        layers: decoder layers whose outputs are taken.
        dim: length of a feature, 2 x layers x hidden size.
        visual_ids: tokens that stand for pixels.
    """

    layers: tuple[int, ...]
    dim: int
    visual_ids: tuple[int, ...]

    @staticmethod
    def of(config: Any, wanted: Sequence[int] | None, who: str) -> Anatomy:  # noqa: ANN401
        """Read a config.

        Args:
            config: a transformers config.
            wanted: layers asked for; None for five, evenly.
            who: for messages.

        Raises:
            BadInput: a model of text alone, or a layer it does not have.
        """
        visual_ids = visual_token_ids(config)
        if not visual_ids:
            raise BadInput(
                f"{who} ({getattr(config, 'model_type', 'unknown type')}) has no image tokens "
                f"(none of {', '.join(VISUAL_KEYS)} in its config): component coincide needs a "
                "vision-language model, such as LLaVA or Qwen2-VL."
            )
        text = config.get_text_config()
        count = int(text.num_hidden_layers)
        layers = even_layers(count) if wanted is None else tuple(wanted)
        if max(layers) >= count:
            raise BadInput(
                f"embedding_layers is {list(layers)}, but {who} has layers 0 to {count - 1}."
            )
        return Anatomy(layers, 2 * len(layers) * int(text.hidden_size), visual_ids)

    @property
    def name(self) -> str:
        """The layers, for the name of a space."""
        return f"layers{'-'.join(map(str, self.layers))}"


class CurrentVisionModel:
    """Features of the model as it is now."""

    def __init__(self, run: RunContext, settings: VisionSettings) -> None:
        self._run, self._settings, self._room = run, settings, Room()
        self._anatomy = Anatomy.of(run.model.config, settings.layers, "the model in training")
        self.dim = self._anatomy.dim
        self.space = f"visual.{self._anatomy.name}"
        self.run_id = run.run_id

    def fields(self) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of its space."""
        data, parameters = self._run.data, named_parameters(self._run.model)
        return {
            "dim": self.dim,
            "dtype": STORED,
            "pooling": "tanh, means of image and of text tokens, unit blocks",
            "layers": list(self._anatomy.layers),
            "base_model": tensor_hash((n, p) for n, p in parameters.items() if not p.requires_grad),
            "tokenizer": tokenizer_hash(data.tokenizer),
            "template": data.template,
            "rows": row_fields(data),
            "pictures": pictures_hash(data.train),
        }

    def identity(self) -> dict[str, Any]:
        """Return the arguments of `embedding_record` that identify its present state."""
        return model_identity(self._run)

    def unit(self, rows: Rows, unit: UnitRange, advance: OnRows) -> UnitFeatures:
        """Compute the features of one unit of rows."""
        model, anatomy = self._run.model, self._anatomy
        batches = Batches(
            rows.dataset,
            self._run.collate,
            rows.lengths,
            token_budget=2 * token_budget(model),
            longest=longest_row(model, rows),
            max_rows=self._settings.batch_rows,
            room=self._room,
        )
        states = VisualStates(model, anatomy.layers, anatomy.visual_ids)
        return compute_embedding_unit(states, batches, unit, advance, dim=self.dim)

    def release(self) -> None:
        """Do nothing: the model in training stays loaded."""


class FixedVisionModel:
    """A vision-language model beside the one in training, with a processor of its own.

    Rows are decoded to text, without the image tokens, and put into the model's own chat format:
    all pictures first, then the text. It is loaded when a first unit is computed.
    """

    def __init__(self, run: RunContext, settings: VisionSettings) -> None:
        """Read its config.

        Raises:
            BadInput: it cannot be read, or is a model of text alone.
        """
        from transformers import AutoConfig

        self._run, self._settings, self._room = run, settings, Room()
        self._trusts = run.config.known.trust_remote_code
        self._folder = find_folder(str(settings.model))
        try:
            config = AutoConfig.from_pretrained(self._folder, trust_remote_code=self._trusts)
        except (OSError, ValueError, ImportError) as error:
            raise BadInput(
                f"embedding_model_name_or_path {settings.model!r} cannot be read: {error}"
            ) from error
        who = f"embedding_model_name_or_path {settings.model!r}"
        self._anatomy = Anatomy.of(config, settings.layers, who)
        self.dim = self._anatomy.dim
        files = hash_folder_files(self._folder, DECIDING)
        self._sha256 = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        self.space = f"visual.{self._sha256[:8]}.{self._anatomy.name}"
        #: Any run with this model and these rows reuses the same features.
        self.run_id = self._sha256
        self._loaded: tuple[VisualStates, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of its space."""
        return {
            "dim": self.dim,
            "dtype": STORED,
            "model": self._sha256,
            "model_dtype": self._settings.dtype,
            "layers": list(self._anatomy.layers),
            # Rows are decoded by it.
            "tokenizer": tokenizer_hash(self._run.data.tokenizer),
            "pictures": pictures_hash(self._run.data.train),
        }

    def identity(self) -> dict[str, Any]:
        """Return the arguments of `embedding_record` that identify its present state."""
        return {"model_hash": self._sha256}

    def unit(self, rows: Rows, unit: UnitRange, advance: OnRows) -> UnitFeatures:
        """Compute the features of one unit of rows."""
        if self._loaded is None:
            self._loaded = self._load()
        states, processor = self._loaded
        batches = Batches(
            TextsWithPictures(
                rows, self._run.data.tokenizer, visual_token_ids(self._run.model.config)
            ),
            lambda items: shown_batch(processor, items),
            # Of the training tokenizer: accurate enough to batch rows of similar length.
            rows.lengths,
            token_budget=2 * token_budget(self._run.model),
            max_rows=self._settings.batch_rows,
            room=self._room,
        )
        return compute_embedding_unit(states, batches, unit, advance, dim=self.dim)

    def release(self) -> None:
        """Unload the model."""
        self._loaded = None

    def _load(self) -> tuple[VisualStates, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor: Any = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                self._folder, trust_remote_code=self._trusts
            )
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self._folder, dtype=DTYPES[self._settings.dtype], trust_remote_code=self._trusts
            )
        except (OSError, ValueError, ImportError) as error:
            raise BadInput(
                f"embedding_model_name_or_path {self._settings.model!r} cannot be loaded: {error}"
            ) from error
        processor.tokenizer.padding_side = "right"
        model.to(next(self._run.model.parameters()).device)
        anatomy = self._anatomy
        return VisualStates(model, anatomy.layers, anatomy.visual_ids), processor
