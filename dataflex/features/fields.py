"""Fields that a space must agree on for this run's features to be comparable with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from dataflex.data.rows import ROW_FIELDS
from gradstore.export.gradient_space import attention_of, named_parameters, tokenizer_hash
from gradstore.storage.hashing import tensor_hash

if TYPE_CHECKING:
    from torch import nn

    from dataflex.run.context import RunContext
    from gradstore.export.gradient_space import GradientSpace


class Tokenised(Protocol):
    """The part of a run's data, or of a question's, that decides which tokens a row has."""

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - a transformers tokenizer
        """The tokenizer, template applied."""

    @property
    def template(self) -> str:
        """Name of the chat template."""

    @property
    def stage(self) -> str:
        """Stage of training, "sft" or "pt"."""

    @property
    def data_args(self) -> Any:  # noqa: ANN401
        """LlamaFactory's DataArguments."""


def space_fields(model: nn.Module, data: Tokenised, space: GradientSpace) -> dict[str, Any]:
    """Return the MUST-EQUAL fields of the gradient space.

    Args:
        model: the model in training.
        data: tokenizer, template and how rows were cut.
        space: the trained parameters, their projection, how features are stored.
    """
    return space.fields(
        model,
        tokenizer=None if data.tokenizer is None else tokenizer_hash(data.tokenizer),
        template=data.template,
        stage=data.stage,
        rows=row_fields(data),
    )


def row_fields(data: Tokenised) -> dict[str, Any]:
    """Return LlamaFactory's settings that decide which tokens a row has; {} without it."""
    if data.data_args is None:
        return {}
    return {field: getattr(data.data_args, field, None) for field in ROW_FIELDS}


def model_identity(run: RunContext) -> dict[str, Any]:
    """Return the arguments of `embedding_record` that say which state a model in training is in."""
    parameters = named_parameters(run.model)
    return {
        "model_hash": tensor_hash((n, p) for n, p in parameters.items() if p.requires_grad),
        "autocast": run.autocast,
        "attention": attention_of(run.model),
    }
