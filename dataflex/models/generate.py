"""Text from a model: continuations of token ids, drawn by numbers that belong to each of them.

A drawn continuation is a function of the model, the prompt and the numbers: the batch it was made
in, the process and the global random states have no part in it (but for the rounding of products
of another shape). Inverse transform sampling needs one uniform number per token.

Letters: b prompts of a batch, t tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.capture.modelstate import borrowed

if TYPE_CHECKING:
    from torch import nn

Ids = list[int]


def continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    pad: int,
    uniforms: npt.NDArray[np.float64] | None = None,
    temperature: float = 1.0,
    autocast: str = "off",
) -> list[Ids]:
    """Continue every prompt of one batch, in eval mode; the model comes back as it was.

    Args:
        model: a causal language model, LoRA adapters inside it or not.
        prompts: b lists of token ids, none empty.
        max_new_tokens: length of a continuation, at most.
        stops: token ids that end a continuation; the stop itself is kept.
        pad: id that fills shorter prompts on the left.
        uniforms: (b, max_new_tokens) numbers in [0, 1) that draw the tokens; None takes the
            likeliest token each time.
        temperature: logits are divided by it; above 0.
        autocast: dtype name of mixed precision, or "off".

    Returns:
        For each of the b prompts, a list of 1 to max_new_tokens ids.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    device = next(inner.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    drawing = LogitsProcessorList()
    if uniforms is not None:
        drawing.append(InverseTransform(uniforms, temperature, width, device))
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stops),
        pad_token_id=pad,
    )
    with borrowed(inner, freeze=False), _plain_defaults(inner), _mixed(device, autocast):
        output = inner.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=drawing,
        )
    return [_until_stop(row, set(stops)) for row in output[:, width:].tolist()]


class InverseTransform:
    """Logits processor that leaves only the drawn token: greedy decoding then takes it."""

    def __init__(
        self,
        uniforms: npt.NDArray[np.float64],
        temperature: float,
        prompt_tokens: int,
        device: torch.device,
    ) -> None:
        """Store the uniform numbers; row i, column j draws token j of prompt i."""
        self._uniforms = torch.from_numpy(np.asarray(uniforms, dtype=np.float64)).to(device)
        self._temperature = temperature
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map (b, t) ids and (b, V) logits to logits that are -inf except at one token."""
        at = input_ids.shape[1] - self._prompt_tokens
        running = (scores.double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        # A product with the last entry, which rounding keeps from being 1.
        points = self._uniforms[:, at : at + 1] * running[:, -1:]
        token = torch.searchsorted(running, points, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def groups_of_similar_length(lengths: Sequence[int], group_rows: int) -> list[npt.NDArray[Any]]:
    """Cut positions 0 to n - 1 into groups, longest first: a function of the lengths alone."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    return [order[at : at + group_rows] for at in range(0, len(order), group_rows)]


def stop_ids(tokenizer: Any) -> Ids:  # noqa: ANN401 - a transformers tokenizer
    """List the ids that end a response: the end-of-text token and the template's stop words."""
    extra = getattr(tokenizer, "additional_special_tokens_ids", None)
    if not isinstance(extra, list):
        names = [str(token) for token in getattr(tokenizer, "_extra_special_tokens", [])]
        extra = tokenizer.convert_tokens_to_ids(names) if names else []
    found = [tokenizer.eos_token_id, *extra]
    return list(dict.fromkeys(i for i in found if isinstance(i, int) and i >= 0))


def prompt_ids(tokenizer: Any, text: str, *, for_answer: bool = True) -> Ids:  # noqa: ANN401
    """Tokenize a question in a model's own chat format, or plain where it has none.

    Args:
        tokenizer: a transformers tokenizer.
        text: the question.
        for_answer: end where the model is to answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    chat = [{"role": "user", "content": text}]
    return list(
        tokenizer.apply_chat_template(chat, add_generation_prompt=for_answer, return_dict=True)[
            "input_ids"
        ]
    )


def pad_id(tokenizer: Any) -> int:  # noqa: ANN401 - a transformers tokenizer
    """Return the padding id; attention masks it, so any id works where there is none."""
    held = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in held if i is not None))


def _until_stop(row: Ids, stops: set[int]) -> Ids:
    end = next((at for at, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]


@contextmanager
def _plain_defaults(model: Any) -> Iterator[None]:  # noqa: ANN401 - a PreTrainedModel
    """Keep a model's own generation settings (penalties, suppressed tokens ...) out of this."""
    from transformers import GenerationConfig

    held = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = held


def _mixed(device: torch.device, autocast: str) -> Any:  # noqa: ANN401 - a context manager
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(autocast)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
