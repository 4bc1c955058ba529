"""Sources of embeddings: the model in training, or a separate text encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataflex.config.values import names_a_folder
from dataflex.data.rows import Rows
from dataflex.features.fields import model_identity, row_fields
from dataflex.models.encoders import (
    Encoder,
    TextEncoder,
    Texts,
    find_encoder,
)
from dataflex.models.passes import longest_row
from dataflex.run.context import RunContext
from dataflex.run.log import OnRows
from gradstore.capture.limits import token_budget
from gradstore.errors import BadInput
from gradstore.export.embeddings import compute_embedding_unit
from gradstore.export.gradient_space import named_parameters, tokenizer_hash
from gradstore.export.output_gradients import OutputGradients, target_tokens
from gradstore.export.pooling import HiddenStates, Pooling
from gradstore.export.room import Room
from gradstore.export.units import Batches
from gradstore.storage.hashing import tensor_hash

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from gradstore.export.units import UnitFeatures
    from gradstore.format.plans import UnitRange

#: How embeddings are stored.
STORED = "float16"


@dataclass(frozen=True)
class EmbeddingSettings:
    """Settings of the embeddings, from the parameters of a selector.

    Attributes:
        model: `embedding_model_name_or_path`; None takes the model in training.
        dtype: `embedding_model_dtype`, of an encoder's weights: auto | fp32 | fp16 | bf16.
        layer: `embedding_layer`, index into the hidden states; -1 is the last layer's output.
        batch_rows: rows of a batch, at most; batches are bounded by tokens as well.
        pooling: how the tokens' states of the model in training become one vector; an encoder has
            its own way.
    """

    model: str | None = None
    dtype: str = "auto"
    layer: int = -1
    batch_rows: int = 32
    pooling: Pooling = "mean"

    @property
    def frozen(self) -> bool:
        """Flag for embeddings that stay the same while the model trains."""
        return self.model is not None

    def faults(self, config: RunConfig) -> list[str]:
        """List the faults that can be found before anything is loaded, one sentence each."""
        if self.model is None:
            return []
        if not (names_a_folder(self.model) or Path(self.model).is_dir()):
            return []  # a hub id is fetched once ranks are there
        try:
            encoder = find_encoder(self.model, trust_remote_code=config.known.trust_remote_code)
            check_layer(self.layer, encoder.layers)
        except BadInput as error:
            return [str(error)]
        return []


def check_layer(layer: int, layers: int) -> None:
    """Refuse an index of a hidden state that does not exist.

    Raises:
        BadInput: names the range.
    """
    if not -layers <= layer < layers:
        raise BadInput(
            f"embedding_layer is {layer}; the embedding model has hidden states {-layers} to "
            f"{layers - 1}."
        )


class Embedder(Protocol):
    """Source of embeddings: its identity, and the computation of a unit."""

    space: str
    dim: int
    run_id: str

    def fields(self) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of its space."""

    def identity(self) -> dict[str, Any]:
        """Return the arguments of `embedding_record` that identify its present state."""

    def unit(self, rows: Rows, unit: UnitRange, advance: OnRows) -> UnitFeatures:
        """Compute the embeddings of one unit of rows."""

    def release(self) -> None:
        """Give back memory until the next unit."""


class CurrentModel:
    """Hidden states of the model as it is now."""

    def __init__(self, run: RunContext, settings: EmbeddingSettings) -> None:
        self._run, self._settings, self._room = run, settings, Room()
        config: Any = run.model.config
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.dim = int(text.hidden_size)
        check_layer(settings.layer, int(text.num_hidden_layers) + 1)
        self.space = f"hidden.layer{settings.layer:+d}"
        if settings.pooling != "mean":
            self.space += f".{settings.pooling}"
        self.run_id = run.run_id

    def fields(self) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of its space."""
        data, parameters = self._run.data, named_parameters(self._run.model)
        return {
            "dim": self.dim,
            "dtype": STORED,
            "pooling": self._settings.pooling,
            "layer": self._settings.layer,
            "base_model": tensor_hash((n, p) for n, p in parameters.items() if not p.requires_grad),
            "tokenizer": tokenizer_hash(data.tokenizer),
            "template": data.template,
            "stage": data.stage,
            "rows": row_fields(data),
        }

    def identity(self) -> dict[str, Any]:
        """Return the arguments of `embedding_record` that identify its present state."""
        return model_identity(self._run)

    def unit(self, rows: Rows, unit: UnitRange, advance: OnRows) -> UnitFeatures:
        """Compute the embeddings of one unit of rows."""
        settings = self._settings
        states = HiddenStates(self._run.model, layer=settings.layer, pooling=settings.pooling)
        return compute_embedding_unit(states, self._batches(rows), unit, advance, dim=self.dim)

    def _batches(self, rows: Rows) -> Batches:
        return Batches(
            rows.dataset,
            self._run.collate,
            rows.lengths,
            token_budget=2 * token_budget(self._run.model),
            longest=longest_row(self._run.model, rows),
            max_rows=self._settings.batch_rows,
            room=self._room,
        )

    def release(self) -> None:
        """Do nothing: the model in training stays loaded."""


class OutputLayer(CurrentModel):
    """Gradients at the output layer of the model as it is now, projected (`OutputGradients`).

    Args:
        run: with its model.
        batch_rows: rows of a batch, at most.
        seed: of the projection.

    Raises:
        BadInput: the model's output layer is not linear.
    """

    def __init__(self, run: RunContext, batch_rows: int, seed: int) -> None:
        self.settings = EmbeddingSettings(batch_rows=batch_rows)
        super().__init__(run, self.settings)
        self._seed = seed
        self._embed = OutputGradients(run.model, seed)
        self.dim, self.space = OutputGradients.dim, "output_gradient"

    def fields(self) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of its space."""
        return super().fields() | {"pooling": "output_gradient", "seed": self._seed}

    def unit(self, rows: Rows, unit: UnitRange, advance: OnRows) -> UnitFeatures:
        """Compute the embeddings of one unit of rows."""
        return compute_embedding_unit(
            self._embed, self._batches(rows), unit, advance, dim=self.dim, tokens_of=target_tokens
        )


class OwnEncoder:
    """A text encoder beside the model in training; loaded when a first unit is computed."""

    def __init__(self, run: RunContext, settings: EmbeddingSettings) -> None:
        self._run, self._settings, self._room = run, settings, Room()
        self._trusts = run.config.known.trust_remote_code
        self._encoder: Encoder = find_encoder(str(settings.model), trust_remote_code=self._trusts)
        check_layer(settings.layer, self._encoder.layers)
        self.dim = self._encoder.dim
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self._encoder.folder.resolve().name)[:60].lstrip(
            "._-"
        )
        self.space = f"{name or 'encoder'}.{self._encoder.sha256[:8]}.layer{settings.layer:+d}"
        #: Any run with this encoder and these rows reuses the same vectors.
        self.run_id = self._encoder.sha256
        self._loaded: TextEncoder | None = None

    def fields(self) -> dict[str, Any]:
        """Return the MUST-EQUAL fields of its space."""
        return {
            "dim": self.dim,
            "dtype": STORED,
            "encoder": self._encoder.sha256,
            "encoder_dtype": self._settings.dtype,
            "layer": self._settings.layer,
            # Rows are decoded by it.
            "tokenizer": tokenizer_hash(self._run.data.tokenizer),
        }

    def identity(self) -> dict[str, Any]:
        """Return the arguments of `embedding_record` that identify its present state."""
        return {"model_hash": self._encoder.sha256}

    def unit(self, rows: Rows, unit: UnitRange, advance: OnRows) -> UnitFeatures:
        """Compute the embeddings of one unit of rows."""
        model = self._run.model
        if self._loaded is None:
            self._loaded = TextEncoder(
                self._encoder,
                dtype=self._settings.dtype,
                layer=self._settings.layer,
                device=next(model.parameters()).device,
                trust_remote_code=self._trusts,
            )
        batches = Batches(
            Texts(rows, self._run.data.tokenizer, self._encoder),
            self._loaded.collate,
            # Of the training tokenizer: accurate enough to batch rows of similar length.
            np.minimum(rows.lengths, self._encoder.max_tokens),
            token_budget=2 * token_budget(model),
            max_rows=self._settings.batch_rows,
            room=self._room,
        )
        return compute_embedding_unit(
            self._loaded.embed,
            batches,
            unit,
            advance,
            dim=self.dim,
            tokens_of=TextEncoder.tokens_of,
        )

    def release(self) -> None:
        """Unload the encoder."""
        self._loaded = None


def embedder_of(run: RunContext, settings: EmbeddingSettings) -> CurrentModel | OwnEncoder:
    """Return the source of embeddings that the settings mean.

    Raises:
        BadInput: the embedding model can't be used.
    """
    return (OwnEncoder if settings.frozen else CurrentModel)(run, settings)
