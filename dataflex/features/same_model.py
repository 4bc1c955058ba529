"""Comparison of a loaded model with the one that a store's features were made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradkernels import ProjectionSpec

from dataflex.features.fields import space_fields
from gradstore.errors import ProvenanceMismatch
from gradstore.export.gradient_space import GradientSpace, attention_of
from gradstore.export.memory import check_published
from gradstore.format.provenance import CANARY, Difference, compare

if TYPE_CHECKING:
    from dataflex.bridge.questions import QuestionModel
    from gradstore.capture.slots import ParameterSlot
    from gradstore.store.generation import Generation


def model_differences(
    train: Generation, loaded: QuestionModel, slots: Sequence[ParameterSlot], precision: str
) -> list[Difference]:
    """List what of a space's fields, and of attention and precision, is otherwise in a model.

    Args:
        train: a train generation; its projection is taken over.
        loaded: the model, with tokenizer and template.
        slots: its trained parameters.
        precision: dtype name of mixed precision, or "off".
    """
    stored = train.provenance
    held = stored.get("projection")
    given = {k: v for k, v in held.items() if k != CANARY} if isinstance(held, dict) else {}
    p = sum(slot.numel for slot in slots)
    projection = ProjectionSpec.from_dict({**given, "p": p})
    check_published(projection, rows=1)
    space = GradientSpace(slots, projection, str(stored.get("dtype")))
    fields = space_fields(loaded.model, loaded, space)
    ours = {"attention": attention_of(loaded.model), "autocast": precision}
    theirs = {field: getattr(train.record, field) for field in ours}
    return [*compare(stored, fields), *compare(theirs, ours)]


def another_model(store: str, differences: Sequence[Difference]) -> ProvenanceMismatch:
    """Build the refusal of a model; lists every difference.

    Args:
        store: path of the store.
        differences: at least one.
    """
    lines = [difference.line(store) for difference in differences]
    listed = "\n  ".join(lines)
    return ProvenanceMismatch(
        f"the model is not the one that the store was made with:\n  {listed}\nName the model and "
        "the checkpoint as they were, with --model and --checkpoint, or build a store of this "
        "model (`dataflex-cli gradstore build`).",
        lines,
    )
