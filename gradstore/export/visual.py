"""Hidden states of a vision-language model -> one vector per row: COINCIDE's features.

Per chosen layer, tanh of the states, averaged over the row's image tokens and over its text
tokens, each brought to length 1; the 2M blocks of M layers laid end to end, over √(2M) (Lee et al.
2024, arXiv:2406.10995).

Letters: b batch, t tokens, h hidden size, M layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstore.capture.modelstate import borrowed
from gradstore.export.units import Batch

#: Names under which configs keep the ids of tokens that stand for pixels.
VISUAL_KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def visual_token_ids(config: Any) -> tuple[int, ...]:  # noqa: ANN401 - a model's config
    """List the ids of image and video placeholder tokens; empty for a text-only model."""
    found = (getattr(config, key, None) for key in VISUAL_KEYS)
    return tuple(sorted({i for i in found if isinstance(i, int) and i >= 0}))


def even_layers(layers: int, count: int = 5) -> tuple[int, ...]:
    """Choose `count` decoder layers, 0-based, spread evenly over `layers`; fewer where few exist.

    Examples:
        >>> even_layers(24), even_layers(32), even_layers(3)
        ((3, 7, 11, 15, 19), (4, 9, 15, 20, 25), (0, 1))
    """
    return tuple(sorted({max(0, (i + 1) * layers // (count + 1) - 1) for i in range(count)}))


def modality_blocks(hidden: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """Compute unit means of tanh(states) over two kinds of tokens, side by side.

    Args:
        hidden: (b, t, h), any floating dtype.
        visual: (b, t) bool, image tokens.
        text: (b, t) bool, text tokens.

    Returns:
        (b, 2, h) float32; zeros where a row has no token of a kind.
    """
    kinds = torch.stack([visual, text], dim=1)  # (b, 2, t)
    # torch.where instead of a product: 0 * inf at a padded position would be NaN.
    states = torch.where((visual | text)[..., None], hidden, 0).float().tanh()
    with torch.autocast(hidden.device.type, enabled=False):
        sums = kinds.float() @ states
    return functional.normalize(sums, dim=2)


class VisualStates:
    """`Embed` of a vision-language model in memory.

    Each call runs in evaluation mode without autograd and gives every flag of the model back.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], visual_ids: Sequence[int]) -> None:
        """Store the model, the layers and the visual token ids for embedding batches.

        Args:
            model: its forward takes `output_hidden_states` and returns one state per input token.
            layers: numbers of decoder layers, 0-based; their outputs are taken.
            visual_ids: from `visual_token_ids`.
        """
        self._model = model
        self._layers = tuple(layers)
        self._visual_ids = torch.tensor(list(visual_ids))
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        parameters = inspect.signature(inner.forward).parameters
        # Nothing is predicted: one position of logits is enough.
        self._fewer: dict[str, int] = (
            {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        )

    def __call__(self, batch: Batch) -> Tensor:
        """Embed a batch with `input_ids`, `attention_mask` (b, t) and pixels: (b, 2·M·h)."""
        device = next(self._model.parameters()).device
        inputs: dict[str, Any] = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key != "labels"
        }
        with borrowed(self._model, freeze=False), torch.no_grad():
            output = self._model(**inputs, output_hidden_states=True, **self._fewer)
        used = inputs["attention_mask"] != 0
        visual = torch.isin(inputs["input_ids"], self._visual_ids.to(device)) & used
        # State 0 is the embedding layer's output.
        blocks = [
            modality_blocks(output.hidden_states[layer + 1], visual, used & ~visual)
            for layer in self._layers
        ]
        return torch.cat(blocks, dim=1).flatten(1) / math.sqrt(2 * len(blocks))
