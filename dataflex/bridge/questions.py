"""A trained model with its template, loaded without data: rows are made as training made them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dataflex.bridge.arguments import as_bad_input, naming_model, own_templates
from dataflex.bridge.origins import row_sources
from dataflex.bridge.quiet import of_questions
from dataflex.bridge.rows import one_row

#: No row is longer.
_UNCUT = 1 << 30
_MEDIA = ("images", "videos", "audios")

#: Token ids and labels of one row, `input_ids`, `labels`, `attention_mask`.
Encoded = dict[str, Any]


def collator(
    stage: str,
    template: Any,  # noqa: ANN401 - LlamaFactory's Template
    model: Any,  # noqa: ANN401 - a PeftModel
    model_args: Any,  # noqa: ANN401 - LlamaFactory's ModelArguments
    module: Mapping[str, Any],
) -> Callable[[list[Any]], Any]:
    """Make the collator of a stage: rows -> padded batch with `labels` (b, t).

    Args:
        stage: sft or pt.
        template: of the chat.
        model: with its config.
        model_args: say in which dtype masks are made.
        module: tokenizer and processor.
    """
    if stage == "pt":
        from transformers import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(tokenizer=module["tokenizer"], mlm=False)
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    found: Callable[[list[Any]], Any] = SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=model,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        compute_dtype=model_args.compute_dtype,
        **module,
    )
    return found


@dataclass(frozen=True)
class QuestionModel:
    """A model to take gradients of, and the way text becomes rows for it.

    Attributes:
        model: with its adapter active and trainable.
        tokenizer: template applied.
        template: name of the chat template.
        stage: sft or pt.
        data_args: LlamaFactory's DataArguments.
        training_args: LlamaFactory's TrainingArguments.
        collate: rows -> padded batch.
    """

    model: Any
    tokenizer: Any
    template: str
    stage: str
    data_args: Any
    training_args: Any
    collate: Callable[[list[Any]], Any]
    _template: Any
    _model_args: Any
    _module: Mapping[str, Any]

    def encode(self, prompt: str, response: str, *, cut: bool = True) -> Encoded:
        """Tokenise one request and its answer as a training row.

        In stage pt a row is one text: the answer follows the request.

        Args:
            prompt: content of the user's turn.
            response: content of the assistant's.
            cut: to `cutoff_len`, as training does.

        Raises:
            BadInput: the template cannot hold it.
        """
        from llamafactory.data import loader

        text = prompt + response if self.stage == "pt" else prompt
        data_args = copy.copy(self.data_args)
        data_args.packing = False
        if not cut:
            data_args.cutoff_len = _UNCUT
        processor = loader._get_dataset_processor(
            data_args, self.stage, self._template, self.tokenizer, self._module.get("processor")
        )
        examples = {
            "_prompt": [[{"role": "user", "content": text}]],
            "_response": [[{"role": "assistant", "content": response}]],
            **{key: [None] for key in ("_system", "_tools", *(f"_{kind}" for kind in _MEDIA))},
        }
        made = as_bad_input(processor.preprocess_dataset)(examples)
        row = {key: list(made[key][0]) for key in ("input_ids", "attention_mask")}
        return {**row, "labels": list(made.get("labels", made["input_ids"])[0])}

    def request(self, prompt: str) -> list[int]:
        """Tokenise a request, up to where the model answers."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
        return list(as_bad_input(self._template.encode_oneturn)(self.tokenizer, turns)[0])

    @property
    def stops(self) -> list[int]:
        """Token ids that end an answer."""
        return list(self._template.get_stop_token_ids(self.tokenizer))

    def source_row(self, data_set: str, number: int) -> Encoded | None:
        """Tokenise one row of a data set's file as training does; None if it would be dropped.

        Raises:
            BadInput: the data set cannot be loaded, or has no such row.
        """
        from llamafactory.data import get_dataset

        def call(data_args: Any) -> dict[str, Any]:  # noqa: ANN401
            found: dict[str, Any] = as_bad_input(get_dataset)(
                self._template, self._model_args, data_args, self.training_args,
                stage=self.stage, **self._module,
            )  # fmt: skip
            return found

        with of_questions(), row_sources() as read:
            row = one_row(data_set, number, call, self.data_args, read.files)
        if row is not None and "labels" not in row:
            row["labels"] = list(row["input_ids"])
        return row

    @staticmethod
    def has_media(row: Mapping[str, Any]) -> bool:
        """Return whether a row has images, videos or audio."""
        return any(row.get(kind) for kind in _MEDIA)


def load_for_questions(arguments: Mapping[str, Any]) -> QuestionModel:
    """Load a model and its template as `gradstore build` does, and no data.

    Args:
        arguments: LlamaFactory's keys of the model, the adapter, the template and the cut.

    Raises:
        BadInput: LlamaFactory refuses them, or cannot load the model.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    settings = {
        "dataset": "none", "output_dir": "none", **arguments, "do_train": True,
        "overwrite_output_dir": True, "resume_from_checkpoint": None, "report_to": "none",
    }  # fmt: skip
    with of_questions(), own_templates():
        model_args, data_args, training_args, finetuning_args, _ = as_bad_input(get_train_args)(
            settings
        )
        module = naming_model(load_tokenizer)(model_args)
        template = as_bad_input(get_template_and_fix_tokenizer)(module["tokenizer"], data_args)
        model = naming_model(load_model)(
            module["tokenizer"], model_args, finetuning_args, is_trainable=True
        )
    stage = finetuning_args.stage
    return QuestionModel(
        model,
        module["tokenizer"],
        str(data_args.template),
        stage,
        data_args,
        training_args,
        collator(stage, template, model, model_args, module),
        template,
        model_args,
        module,
    )
