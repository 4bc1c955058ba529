"""LlamaFactory's training: untouched, with our trainer in place of its own, or up to the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dataflex.bridge.arguments import (
    alone,
    as_bad_input,
    configuration_faults,
    naming_model,
    swapped,
)
from dataflex.bridge.origins import row_sources
from dataflex.bridge.questions import collator
from dataflex.bridge.quiet import as_chosen, lines_on_the_page
from dataflex.bridge.rows import Arrange, dataset_loader
from dataflex.config.keys import RunConfig
from dataflex.data.rows import RunData

#: Takes rows, TrainingArguments and FinetuningArguments.
OnParsed = Callable[[RunData, Any, Any], None]


class Session(Protocol):
    """The part of a training session that LlamaFactory's training is run with."""

    @property
    def args(self) -> Mapping[str, Any]:
        """Arguments that LlamaFactory parses."""
        ...

    @property
    def arrange(self) -> Arrange | None:
        """The order to put raw training rows in before they are tokenised, if any."""
        ...

    def take_data(self, data: RunData, training_args: Any, tuned: Any) -> None:  # noqa: ANN401
        """Take rows, TrainingArguments and FinetuningArguments, before a model is loaded."""
        ...

    def trainer_for(self, base: type) -> Callable[..., Any]:
        """Make the callable that builds the trainer in the place of LlamaFactory's, `base`."""
        ...


def run_untouched(args: Mapping[str, Any]) -> None:
    """Run LlamaFactory's own training, nothing replaced (`train_type: static`)."""
    from llamafactory.train.tuner import run_exp

    with configuration_faults(), as_chosen():
        run_exp(dict(args))


def load_untouched(args: Mapping[str, Any]) -> int | None:
    """Parse arguments and load rows as `run_untouched` does, and stop there; nothing is written.

    Returns:
        Number of training rows; None where they are a stream.

    Raises:
        BadInput: LlamaFactory refuses an argument, the model's folder or the rows.
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.extras.misc import has_tokenized_data
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    with configuration_faults(), as_chosen():
        model_args, data_args, training_args, finetuning_args, _ = as_bad_input(get_train_args)(
            dict(args)
        )
        module = naming_model(load_tokenizer)(model_args)
        template = as_bad_input(get_template_and_fix_tokenizer)(module["tokenizer"], data_args)
        if data_args.tokenized_path and not has_tokenized_data(data_args.tokenized_path):
            data_args.tokenized_path = None  # where the run would keep its rows
        stage = {"dpo": "rm"}.get(finetuning_args.stage, finetuning_args.stage)
        loaded = as_bad_input(get_dataset)(
            template, model_args, data_args, training_args, stage=stage, **module
        )
    train = loaded.get("train_dataset", ())
    return len(train) if hasattr(train, "__len__") else None


def run_replaced(config: RunConfig, session: Session) -> None:
    """Run LlamaFactory's training with our trainer in the place of its own.

    Args:
        config: the whole configuration; its target sets are loaded as training data.
        session: arguments, trainer, checks of the rows.
    """
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.sft import workflow as sft
    from llamafactory.train.tuner import run_exp

    with contextlib.ExitStack() as stack:
        stack.enter_context(configuration_faults())
        stack.enter_context(as_chosen())
        stack.enter_context(lines_on_the_page())
        files = stack.enter_context(row_sources())
        stack.enter_context(_log_of_our_trainer())
        tuned = stack.enter_context(_finetuning_arguments())

        def take(data: RunData, training_args: object) -> None:
            session.take_data(data, training_args, tuned[-1])

        load = dataset_loader(config, sft.get_dataset, take, files, session.arrange)
        for workflow, trainer in ((sft, "CustomSeq2SeqTrainer"), (pt, "CustomTrainer")):
            ours = session.trainer_for(getattr(workflow, trainer))
            stack.enter_context(swapped(workflow, trainer, ours))
            stack.enter_context(swapped(workflow, "get_dataset", load))
        run_exp(dict(session.args))


@contextlib.contextmanager
def _finetuning_arguments() -> Iterator[list[Any]]:
    """Give a list that takes the FinetuningArguments once LlamaFactory has parsed them."""
    from llamafactory.train import tuner

    found: list[Any] = []
    parse = tuner.get_train_args

    def kept(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        parsed = parse(*args, **kwargs)
        found.append(parsed[3])
        return parsed

    with swapped(tuner, "get_train_args", kept):
        yield found


@contextlib.contextmanager
def _log_of_our_trainer() -> Iterator[None]:
    """Add our numbers to `trainer_log.jsonl`, and leave an earlier run's until training begins.

    LlamaFactory writes only the keys it knows; it removes the earlier file when the trainer is
    built, before the checks that may still refuse the run.
    """
    from llamafactory.train import tuner

    class WholeLines(tuner.LogCallback):  # type: ignore[misc]
        def on_init_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            pass

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            super().on_init_end(*args, **kwargs)
            super().on_train_begin(*args, **kwargs)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
            ours = {k: v for k, v in state.log_history[-1].items() if k.startswith("dataflex/")}

            def write(output_dir: str, logs: dict[str, Any]) -> None:
                super(WholeLines, self)._write_log(output_dir, {**logs, **ours})

            # The line is written later, by another thread: it keeps the numbers of now.
            self._write_log = write
            super().on_log(args, state, control, **kwargs)

    with swapped(tuner, "LogCallback", WholeLines):
        yield


@dataclasses.dataclass(frozen=True)
class ExportInputs:
    """A trained model and the rows to export, outside of training."""

    model: Any
    data: RunData
    collate: Any
    training_args: Any


def load_run(
    config: RunConfig, checkpoint: Path | None, on_data: OnParsed, device: int = 0
) -> ExportInputs:
    """Load data and model as a training run would, in one process, with a checkpoint's adapter.

    Args:
        config: the configuration of the run.
        checkpoint: a folder with an adapter; None for a fresh one, or for a run that trains none.
        on_data: called with the processed rows, TrainingArguments and FinetuningArguments before
            the model is loaded; the place to refuse rows.
        device: number of the one to use, where several are visible (`arguments.alone`).
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    args = {**alone(config.llamafactory, device), "do_train": True, "overwrite_output_dir": True,
            "resume_from_checkpoint": None}  # fmt: skip
    if checkpoint is not None:
        # A merged base adapter stays merged; the checkpoint is the one that trains.
        known = config.known
        merged = known.adapter_name_or_path if known.create_new_adapter else ()
        args["adapter_name_or_path"] = ",".join([*merged, str(checkpoint)])
        args["create_new_adapter"] = False
    with configuration_faults(), as_chosen(), row_sources() as files:
        model_args, data_args, training_args, finetuning_args, _ = as_bad_input(get_train_args)(
            args
        )
        module = naming_model(load_tokenizer)(model_args)
        template = as_bad_input(get_template_and_fix_tokenizer)(module["tokenizer"], data_args)
        held: list[RunData] = []

        def hold(data: RunData, training_args: object) -> None:
            on_data(data, training_args, finetuning_args)
            held.append(data)

        load = dataset_loader(config, get_dataset, hold, files)
        load(template, model_args, data_args, training_args, stage=finetuning_args.stage, **module)
        model = naming_model(load_model)(
            module["tokenizer"], model_args, finetuning_args, is_trainable=True
        )
    collate = collator(finetuning_args.stage, template, model, model_args, module)
    return ExportInputs(model, held[0], collate, training_args)


def passthrough(arguments: Sequence[str]) -> None:
    """Run another llamafactory-cli command exactly as it would run itself."""
    import sys

    from llamafactory.cli import main

    sys.argv = ["llamafactory-cli", *arguments]
    main()
