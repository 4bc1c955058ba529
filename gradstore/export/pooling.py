"""Hidden states of a model -> one vector per row, of length 1 unless asked otherwise.

Letters: b batch, t tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradstore.capture.modelstate import borrowed
from gradstore.errors import BadInput
from gradstore.export.units import Batch

#: Batch, as `collate` gave it, -> (b, d) vectors, of any length and floating dtype.
Embed = Callable[[Batch], Tensor]

Pooling = Literal["mean", "first_token", "last_token", "position"]

POOLINGS: tuple[Pooling, ...] = ("mean", "first_token", "last_token", "position")


def pool(hidden: Tensor, mask: Tensor, how: Pooling = "mean", *, unit: bool = True) -> Tensor:
    """Pool token states into one vector per row; padding on either side has no effect.

    Args:
        hidden: (b, t, d), any floating dtype.
        mask: (b, t), 0 where a token does not count.
        how: "mean" over the tokens, the "first_token", the "last_token", or weights that rise with
            the "position" (1, 2, 3 ... from the row's first token).
        unit: rows of length 1; else the weighted mean of the row's tokens as it is.

    Returns:
        (b, d) float32; zeros where no token counts.

    Raises:
        BadInput: no such pooling, or shapes that do not fit.

    Examples:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> pool(hidden, torch.ones(1, 3), "position")
        tensor([[0.6247, 0.7809]])
    """
    if how not in POOLINGS:
        raise BadInput(f"pooling is {how!r}; choose {', '.join(POOLINGS)}")
    if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        raise BadInput(
            f"hidden {tuple(hidden.shape)} and mask {tuple(mask.shape)} do not fit; "
            "give hidden (b, t, d) and its mask (b, t)"
        )
    counts = mask.to(hidden.device) != 0
    rank = counts.cumsum(dim=1)  # (b, t): 1 at a row's first token that counts
    weights = {
        "mean": counts,
        "first_token": counts & (rank == 1),
        "last_token": counts & (rank == rank[:, -1:]),
        "position": rank * counts,
    }[how]
    # torch.where instead of a product: 0 * inf at a padded position would be NaN.
    states = torch.where(counts[..., None], hidden, 0).float()
    with torch.autocast(hidden.device.type, enabled=False):
        summed = (states * weights[..., None]).sum(dim=1)
    if unit:
        return to_unit(summed)[0]
    return summed / weights.sum(dim=1).clamp(min=1)[:, None]


def to_unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize vectors (b, d) to float32 unit rows; return float64 lengths (b,); zeros stay zeros.

    A row that is not finite keeps a length that is not.
    """
    wide = vectors.double()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return (wide / torch.where(norm > 0, norm, 1.0)[:, None]).float(), norm


class HiddenStates:
    """`Embed` of a model in memory: a hidden layer, pooled over the attention mask.

    The model is any module whose forward takes `output_hidden_states` and returns
    `.hidden_states`. Each call runs in evaluation mode without autograd, and gives every flag of
    the model back; autocast is the caller's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: int = -1,
        pooling: Pooling = "mean",
        unit: bool = True,
    ) -> None:
        """Store the model and the settings for embedding batches.

        Args:
            model: in training or not.
            layer: index into the hidden states; -1 is the last layer's output.
            pooling: how a row's tokens become one vector.
            unit: rows of length 1.

        Raises:
            BadInput: no such pooling.
        """
        if pooling not in POOLINGS:
            raise BadInput(f"pooling is {pooling!r}; choose {', '.join(POOLINGS)}")
        self._model = model
        self._layer = layer
        self._pooling = pooling
        self._unit = unit

    def __call__(self, batch: Batch) -> Tensor:
        """Embed a batch with `input_ids` and `attention_mask` (b, t): (b, d) float32.

        Raises:
            BadInput: the model has no such layer.
        """
        device = next(self._model.parameters()).device
        inputs: dict[str, Any] = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key != "labels"
        }
        with borrowed(self._model, freeze=False), torch.no_grad():
            states = self._model(**inputs, output_hidden_states=True).hidden_states
        if not -len(states) <= self._layer < len(states):
            raise BadInput(
                f"layer is {self._layer}; the model has hidden states {-len(states)} to "
                f"{len(states) - 1}; "
                "choose one of them"
            )
        return pool(states[self._layer], inputs["attention_mask"], self._pooling, unit=self._unit)


def attention_tokens(batch: Batch) -> Tensor:
    """Count the tokens of each row (b,) that the model attends to."""
    return batch["attention_mask"].sum(dim=1)
