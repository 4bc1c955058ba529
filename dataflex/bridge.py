"""The only file that touches LlamaFactory's internals.

What it relies on, all of LlamaFactory 0.9.5: `train.tuner.run_exp(args: dict)`; the names
`CustomSeq2SeqTrainer`, `CustomTrainer` and `get_dataset` in the sft and pt workflows; and, to carry
a row's origin through preprocessing, `load_dataset`, `align_dataset` and `_get_dataset_processor`
in `data.loader`. A context manager swaps them for one run and puts them back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from dataflex.config import RunConfig, names
from dataflex.data import SOURCE_ROW, SOURCE_SET, Domains, RawRows, Rows, RunData
from dataflex.domains import BY_DOMAIN, held_out_rows, load_domains
from dataflex.provenance import tokenizer_hash
from gradstore.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OnData = Callable[[RunData, Any], None]
MakeTrainer = Callable[[type], Callable[..., Any]]
Arrange = Callable[[RawRows], "npt.NDArray[np.int64]"]

#: LlamaFactory's stages; each has a workflow of its own.
STAGES = ("pt", "sft", "rm", "dpo", "kto", "ppo")


def accepted_keys() -> set[str]:
    """Every key LlamaFactory's own training arguments know."""
    return {f.name for cls in _argument_classes() for f in dataclasses.fields(cls) if f.init}


def mistyped(args: Mapping[str, Any]) -> list[str]:
    """One sentence for every value where LlamaFactory's arguments want a number or true/false.

    Its parser takes any value for any key and fails much later, with a TypeError.
    """
    faults = []
    for cls in _argument_classes():
        for name, hint in get_type_hints(cls).items():
            value = args.get(name)
            wanted = set(get_args(hint) or (hint,)) - {type(None)}
            if value is None or not wanted <= {int, float, bool}:
                continue
            if isinstance(value, bool | int | float) and not _unusable(value, wanted):
                continue
            number = "a number" if float in wanted else "a whole number"
            expected = "true or false" if wanted == {bool} else f"{number}, without quotes"
            faults.append(f"{name} is {value!r}; expected {expected}.")
    return faults


def _unusable(value: float, wanted: set[Any]) -> bool:
    """A boolean for a number, NaN, or a fraction where a whole number is wanted."""
    if isinstance(value, bool):
        return bool not in wanted
    return math.isnan(value) or not (float in wanted or float(value).is_integer())


def _argument_classes() -> tuple[Any, ...]:
    from llamafactory.hparams import (
        DataArguments,
        FinetuningArguments,
        GeneratingArguments,
        ModelArguments,
        TrainingArguments,
    )

    return (DataArguments, FinetuningArguments, GeneratingArguments, ModelArguments,
            TrainingArguments)  # fmt: skip


def device_count() -> int:
    """Accelerators LlamaFactory would use; 0 on a machine with a CPU only."""
    from llamafactory.extras.misc import get_device_count

    return int(get_device_count())


def run_untouched(args: Mapping[str, Any]) -> None:
    """LlamaFactory's own training, nothing replaced (`train_type: static`)."""
    from llamafactory.train.tuner import run_exp

    with _configuration_faults():
        run_exp(dict(args))


def run_replaced(
    config: RunConfig,
    args: Mapping[str, Any],
    make_trainer: MakeTrainer,
    on_data: OnData,
    arrange: Arrange | None = None,
) -> None:
    """LlamaFactory's training with our trainer in its place.

    Args:
        config: the whole configuration; its target sets are loaded as training data.
        args: what LlamaFactory parses.
        make_trainer: LlamaFactory's trainer class -> what builds the trainer.
        on_data: called with the processed rows and the TrainingArguments before a model is loaded.
        arrange: the order to put raw training rows in before they are tokenised.
    """
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.sft import workflow as sft
    from llamafactory.train.tuner import run_exp

    with contextlib.ExitStack() as stack:
        stack.enter_context(_configuration_faults())
        files = stack.enter_context(_row_sources())
        stack.enter_context(_whole_log_lines())
        load = _dataset_loader(config, sft.get_dataset, on_data, files, arrange)
        for workflow, trainer in ((sft, "CustomSeq2SeqTrainer"), (pt, "CustomTrainer")):
            stack.enter_context(
                _swapped(workflow, trainer, make_trainer(getattr(workflow, trainer)))
            )
            stack.enter_context(_swapped(workflow, "get_dataset", load))
        run_exp(dict(args))


@contextlib.contextmanager
def _whole_log_lines() -> Iterator[None]:
    """`trainer_log.jsonl` gets our numbers too: LlamaFactory writes the keys it knows alone."""
    from llamafactory.train import tuner

    class WholeLines(tuner.LogCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
            ours = {k: v for k, v in state.log_history[-1].items() if k.startswith("dataflex/")}

            def write(output_dir: str, logs: dict[str, Any]) -> None:
                super(WholeLines, self)._write_log(output_dir, {**logs, **ours})

            # The line is written later, by another thread: it keeps the numbers of now.
            self._write_log = write
            super().on_log(args, state, control, **kwargs)

    with _swapped(tuner, "LogCallback", WholeLines):
        yield


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A model with a trained adapter and the rows to export, outside of training."""

    model: Any
    data: RunData
    collate: Any
    training_args: Any


def load_run(config: RunConfig, checkpoint: Path | None, on_data: OnData) -> LoadedRun:
    """Load data and model as a training run would, with a checkpoint's adapter active.

    Args:
        config: the configuration of the run.
        checkpoint: a folder with an adapter; None for a fresh one.
        on_data: as in `run_replaced`: checks the rows before the model is loaded.
    """
    from llamafactory.data import (
        SFTDataCollatorWith4DAttentionMask,
        get_dataset,
        get_template_and_fix_tokenizer,
    )
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    args = {**config.llamafactory, "do_train": True, "overwrite_output_dir": True,
            "resume_from_checkpoint": None}  # fmt: skip
    if checkpoint is not None:
        # A merged base adapter stays merged; the checkpoint is the one that trains.
        merged = names(config.get("adapter_name_or_path"))
        merged = merged if config.get("create_new_adapter", False) else ()
        args["adapter_name_or_path"] = ",".join([*merged, str(checkpoint)])
        args["create_new_adapter"] = False
    with _configuration_faults(), _row_sources() as files:
        model_args, data_args, training_args, finetuning_args, _ = _as_bad_input(
            get_train_args, ARGUMENT_FAULTS
        )(args)
        module = _naming_model(load_tokenizer)(model_args)
        template = _as_bad_input(get_template_and_fix_tokenizer)(module["tokenizer"], data_args)
        held: list[RunData] = []

        def hold(data: RunData, training_args: object) -> None:
            on_data(data, training_args)
            held.append(data)

        load = _dataset_loader(config, get_dataset, hold, files)
        load(template, model_args, data_args, training_args, stage=finetuning_args.stage, **module)
        model = _naming_model(load_model)(
            module["tokenizer"], model_args, finetuning_args, is_trainable=True
        )
    if finetuning_args.stage == "pt":
        from transformers import DataCollatorForLanguageModeling

        collate: Any = DataCollatorForLanguageModeling(tokenizer=module["tokenizer"], mlm=False)
    else:
        collate = SFTDataCollatorWith4DAttentionMask(
            template=template,
            model=model,
            pad_to_multiple_of=8,
            label_pad_token_id=-100,
            attn_implementation=getattr(model.config, "_attn_implementation", None),
            compute_dtype=model_args.compute_dtype,
            **module,
        )
    return LoadedRun(model, held[0], collate, training_args)


def _dataset_loader(
    config: RunConfig,
    original: Callable[..., dict[str, Any]],
    on_data: OnData,
    files: Mapping[str, Any],
    arrange: Arrange | None = None,
) -> Callable[..., dict[str, Any]]:
    """Wrap `get_dataset`: load targets beside the training rows, strip origins, report both."""

    def load(
        template: Any,  # noqa: ANN401 - LlamaFactory's Template
        model_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
        data_args: Any,  # noqa: ANN401
        training_args: Any,  # noqa: ANN401
        stage: str,
        tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
        processor: Any = None,  # noqa: ANN401
    ) -> dict[str, Any]:
        def call(data_args: Any, training_args: Any) -> dict[str, Any]:  # noqa: ANN401
            return original(template, model_args, data_args, training_args, stage=stage,
                            tokenizer=tokenizer, processor=processor)  # fmt: skip

        domains = None
        if config.dataflex.train_type in BY_DOMAIN:
            made_with = {"stage": stage, "template": str(data_args.template),
                         "tokenizer": tokenizer_hash(tokenizer)}  # fmt: skip
            module, domains = load_domains(config, data_args, training_args, call, _rows, made_with)
        else:
            names = ", ".join(data_args.dataset or ())
            with _naming(f"dataset {names}"), _arranged(data_args, files, arrange):
                module = dict(call(data_args, training_args))
        if module.get("train_dataset") is None:
            raise BadInput("there is no training data: set dataset.")
        train = _rows("train", module["train_dataset"])
        module["train_dataset"] = train.dataset
        evaluation = module.get("eval_dataset")
        if isinstance(evaluation, dict):
            module["eval_dataset"] = {k: _rows(k, v).dataset for k, v in evaluation.items()}
        elif evaluation is not None:
            module["eval_dataset"] = _rows("eval", evaluation).dataset
        targets = _load_targets(config, data_args, training_args, call, domains)
        on_data(
            RunData(
                train, targets, tokenizer, str(data_args.template), data_args, stage, domains, files
            ),
            training_args,
        )
        return module

    return load


def _load_targets(
    config: RunConfig,
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
    call: Callable[[Any, Any], dict[str, Any]],
    domains: Domains | None,
) -> tuple[Rows, ...]:
    """Each target set by a call of its own, as training data.

    LlamaFactory merges evaluation sets, and under `predict_with_generate` tokenises them without
    their responses: neither would do for gradients.
    """
    as_training = copy.copy(training_args)
    as_training.predict_with_generate = False
    sets = tuple(config.dataflex.target_dataset or ()) or tuple(data_args.eval_dataset or ())
    found = []
    for name in sets:
        one = copy.copy(data_args)
        one.dataset, one.eval_dataset, one.val_size = [name], None, 0.0
        one.tokenized_path, one.mix_strategy, one.interleave_probs = None, "concat", None
        with _naming(f"target set {name!r}"):
            found.append(_rows(name, call(one, as_training)["train_dataset"]))
    if not sets and float(data_args.val_size) > 0 and domains is not None:
        found.append(held_out_rows(domains))
    elif not sets and float(data_args.val_size) > 0:
        split = call(data_args, as_training).get("eval_dataset")
        if split is not None:
            found.append(_rows("validation", split))
    return tuple(found)


def _rows(name: str, dataset: Any) -> Rows:  # noqa: ANN401 - a datasets.Dataset
    if SOURCE_ROW not in (getattr(dataset, "column_names", None) or ()):
        return Rows(name, dataset)
    origins = tuple(zip(dataset[SOURCE_SET], dataset[SOURCE_ROW], strict=True))
    return Rows(name, dataset.remove_columns([SOURCE_SET, SOURCE_ROW]), origins)


#: What LlamaFactory raises for arguments of a wrong type or value, or that need a missing library.
ARGUMENT_FAULTS = (ValueError, TypeError, ImportError)


@contextlib.contextmanager
def _configuration_faults() -> Iterator[None]:
    """What LlamaFactory raises for bad arguments, data and models becomes `BadInput`."""
    from datasets.exceptions import DatasetsError
    from llamafactory.data import loader
    from llamafactory.train import tuner

    data_faults = (ValueError, RuntimeError, DatasetsError)
    places: list[tuple[Any, str, tuple[type[Exception], ...]]] = [
        (tuner, "get_train_args", ARGUMENT_FAULTS),
        (loader, "_get_merged_dataset", (*data_faults, KeyError)),
        (loader, "_get_preprocessed_dataset", data_faults),
        (loader, "split_dataset", data_faults),
    ]
    loaders: list[tuple[Any, str]] = []
    for stage in STAGES:
        workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
        places.append((workflow, "get_template_and_fix_tokenizer", (ValueError,)))
        loaders += [(workflow, name) for name in ("load_tokenizer", "load_model")]
    with contextlib.ExitStack() as stack:
        for module, name in loaders:
            stack.enter_context(_swapped(module, name, _naming_model(getattr(module, name))))
        for module, name, faults in places:
            guarded = _as_bad_input(getattr(module, name), faults)
            stack.enter_context(_swapped(module, name, guarded))
        yield


@contextlib.contextmanager
def _swapped(module: Any, name: str, replacement: object) -> Iterator[None]:  # noqa: ANN401
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


def _as_bad_input(
    function: Callable[..., Any], faults: tuple[type[Exception], ...] = (ValueError,)
) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        try:
            return function(*args, **kwargs)
        except StopIteration as error:
            raise BadInput("a data set is empty: its file holds no row.") from error
        except faults as error:
            cause = error.__cause__ or error
            reason = f"a row has no {cause}" if isinstance(cause, KeyError) else str(cause)
            raise BadInput(f"LlamaFactory refuses the configuration or data: {reason}") from error

    return wrapped


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """LlamaFactory's complaints about data do not say which set they are about."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from error


def _naming_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_tokenizer` or `load_model`, whose complaints do not say what was to be loaded."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a transparent wrapper
        try:
            return function(*args, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            (name,) = (a.model_name_or_path for a in args if hasattr(a, "model_name_or_path"))
            reason = " ".join(str(error.__cause__ or error).split())
            raise BadInput(f"model_name_or_path {name!r} cannot be loaded: {reason}") from error

    return wrapped


@contextlib.contextmanager
def _arranged(
    data_args: Any,  # noqa: ANN401 - LlamaFactory's DataArguments
    files: Mapping[str, Any],
    arrange: Arrange | None,
) -> Iterator[None]:
    """Put the training rows in another order, all sets together, before they are tokenised."""
    from llamafactory.data import loader

    merge = loader._get_merged_dataset

    def merged(names: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        dataset = merge(names, *args, **kwargs)
        if arrange is None or names is not data_args.dataset:
            return dataset
        if SOURCE_ROW not in dataset.column_names:
            raise BadInput("where its rows come from is unknown, so they cannot be put in order.")
        sources = tuple(zip(dataset[SOURCE_SET], dataset[SOURCE_ROW], strict=True))
        return dataset.select(arrange(RawRows(sources, files)))

    with _swapped(loader, "_get_merged_dataset", merged):
        yield


@contextlib.contextmanager
def _row_sources() -> Iterator[dict[str, Any]]:
    """Carry (data set, index in its file) through loading, alignment and tokenisation.

    Both columns are added right after the file is read. Alignment maps row to row but drops all
    columns; tokenisation may drop rows, so it is run row by row and the survivors keep theirs.
    Yields the numbered rows by data set as they were read, with columns that alignment drops.
    """
    from llamafactory.data import loader

    files: dict[str, Any] = {}
    read, align, listed = loader.load_dataset, loader.align_dataset, loader.get_dataset_list
    processor_for = loader._get_dataset_processor

    def list_named(names: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        found = listed(names, *args, **kwargs)
        for name, attributes in zip(names or (), found, strict=True):
            attributes.source_name = name
        return found

    def read_numbered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        dataset = read(*args, **kwargs)
        if kwargs.get("streaming") or not hasattr(dataset, "add_column"):
            return dataset
        return dataset.add_column(SOURCE_ROW, list(range(len(dataset))))

    def align_numbered(dataset: Any, dataset_attr: Any, data_args: Any, training_args: Any) -> Any:  # noqa: ANN401
        plain = data_args.tokenized_path is None and not data_args.streaming
        numbers = dataset[SOURCE_ROW] if plain and SOURCE_ROW in dataset.column_names else None
        if numbers is not None:
            files[dataset_attr.source_name] = dataset
        if SOURCE_ROW in (dataset.column_names or ()):
            dataset = dataset.remove_columns(SOURCE_ROW)
        aligned = align(dataset, dataset_attr, data_args, training_args)
        if numbers is None:
            return aligned
        aligned = aligned.add_column(SOURCE_ROW, list(numbers))
        return aligned.add_column(SOURCE_SET, [dataset_attr.source_name] * len(aligned))

    def processor_numbered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return _SourceCarrier(processor_for(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for name, replacement in (
            ("get_dataset_list", list_named),
            ("load_dataset", read_numbered),
            ("align_dataset", align_numbered),
            ("_get_dataset_processor", processor_numbered),
        ):
            stack.enter_context(_swapped(loader, name, replacement))
        yield files


class _SourceCarrier:
    """A dataset processor that keeps the origin of every row it does not drop."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - LlamaFactory's DatasetProcessor
        self.inner = inner

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """As the inner one, row by row where rows carry an origin and stay single."""
        if SOURCE_ROW not in examples or self.inner.data_args.packing:
            dropped = {SOURCE_ROW, SOURCE_SET}
            return dict(
                self.inner.preprocess_dataset(
                    {k: v for k, v in examples.items() if k not in dropped}
                )
            )
        found: dict[str, list[Any]] = {}
        for i in range(len(examples[SOURCE_ROW])):
            one = self.inner.preprocess_dataset({k: [v[i]] for k, v in examples.items()})
            kept = len(next(iter(one.values()), []))
            one = {**one, SOURCE_ROW: [examples[SOURCE_ROW][i]] * kept,
                   SOURCE_SET: [examples[SOURCE_SET][i]] * kept}  # fmt: skip
            for key, values in one.items():
                found.setdefault(key, []).extend(values)
        return found

    def print_data_example(self, example: dict[str, list[int]]) -> None:
        """Pass through."""
        self.inner.print_data_example(example)


def passthrough(arguments: Sequence[str]) -> None:
    """Run another llamafactory-cli command exactly as it would run itself."""
    import sys

    from llamafactory.cli import main

    sys.argv = ["llamafactory-cli", *arguments]
    main()
