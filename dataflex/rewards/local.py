"""A reward from a model on this machine: a language model that is asked, or a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dataflex.models.frozen import load_language_model, load_model, named_faults
from dataflex.models.generate import (
    continuations,
    groups_of_similar_length,
    pad_id,
    prompt_ids,
    stop_ids,
)
from dataflex.models.paths import model_path_faults
from dataflex.rewards.base import (
    PROBE_ANSWER,
    PROBE_PROMPT,
    JudgeRequest,
    RewardPrompts,
    Verdict,
    parse_score,
    refuse_probe,
)
from gradstore.capture.limits import max_positions

if TYPE_CHECKING:
    from torch import nn

#: Responses scored in one batch.
GROUP_ROWS = 16


class LocalJudge:
    """Judge that loads a model once and keeps it off the accelerator between updates.

    A causal language model reads the reward prompt and its answer is parsed for a score; a sequence
    classifier's first logit goes through a sigmoid (its last class's probability, if it has several
    classes).

    Args:
        path: folder or hub id; must be given.
        prompts: what the model reads.
        max_new_tokens: length of a language model's answer.
        trust_remote_code: let the model bring its own code.
    """

    def __init__(
        self,
        path: str | None,
        prompts: RewardPrompts,
        max_new_tokens: int,
        trust_remote_code: bool = False,
    ) -> None:
        self.path = path
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.trust_remote_code = trust_remote_code
        self._model: Any = None
        self._tokenizer: Any = None
        self._classifies = False
        self._device = torch.device("cpu")

    def identity(self) -> Mapping[str, Any]:
        """Return the model's path and its prompts."""
        prompts = [self.prompts.with_reference, self.prompts.without_reference]
        return {"reward": "local", "model": self.path, "prompts": prompts}

    def faults(self) -> list[str]:
        """Check that the path exists and names a model, and check the prompts."""
        found = self.prompts.faults()
        if not self.path:
            return [
                "reward_backend is local, but reward_model_path is missing: name a model.",
                *found,
            ]
        return [*model_path_faults("reward_model_path", self.path), *found]

    def start(self, model: nn.Module) -> None:
        """Load the model and, if it answers in words, ask it once.

        Raises:
            BadInput: it cannot be loaded, or its answer has no score.
        """
        self._device = next(model.parameters()).device
        self._model, self._tokenizer, self._classifies = load_judge(
            str(self.path), self.trust_remote_code
        )
        if not self._classifies:
            (verdict,) = self.judge([JudgeRequest(PROBE_PROMPT, PROBE_ANSWER, PROBE_ANSWER)])
            refuse_probe(f"reward_model_path {self.path!r}", verdict)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Judge responses of similar length together, with the model on the accelerator."""
        prompts = [self._ids(self.prompts.fill(request)) for request in requests]
        found: dict[int, Verdict] = {}
        with self._placed(), torch.no_grad():
            for group in groups_of_similar_length([len(p) for p in prompts], GROUP_ROWS):
                verdicts = self._batch([prompts[i] for i in group])
                found.update(zip(group.tolist(), verdicts, strict=True))
        return [found[i] for i in range(len(requests))]

    def _batch(self, prompts: list[list[int]]) -> list[Verdict]:
        if self._classifies:
            return [Verdict(self._classified(prompt)) for prompt in prompts]
        answers = continuations(
            self._model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            stops=stop_ids(self._tokenizer),
            pad=pad_id(self._tokenizer),
        )
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [Verdict(parse_score(text), text) for text in texts]

    def _classified(self, prompt: list[int]) -> float:
        """Score one prompt at a time: classifiers without a padding token can't take batches."""
        ids = torch.tensor([prompt], device=self._device)
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        row = logits[0].double()
        reward = row.sigmoid()[0] if len(row) == 1 else row.softmax(dim=0)[-1]
        return float(reward)

    def _ids(self, text: str) -> list[int]:
        """Tokenize the prompt in the model's own chat format; keep the end if it is too long."""
        ids = prompt_ids(self._tokenizer, text, for_answer=not self._classifies)
        longest = max_positions(self._model)
        room = None if longest is None else max(1, longest - self.max_new_tokens)
        return ids if room is None else ids[-room:]

    @contextmanager
    def _placed(self) -> Iterator[None]:
        self._model.to(self._device)
        try:
            yield
        finally:
            self._model.to("cpu")


def load_judge(path: str, trust_remote_code: bool) -> tuple[Any, Any, bool]:
    """Load model and tokenizer; return with them whether it is a sequence classifier.

    Raises:
        BadInput: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with named_faults(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if any("SequenceClassification" in name for name in config.architectures or ()):
        return *load_model(path, AutoModelForSequenceClassification, trust_remote_code), True
    return *load_language_model(path, trust_remote_code), False
