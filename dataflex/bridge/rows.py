"""Rows as LlamaFactory processes them, each with its origin, and the target sets beside them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dataflex.bridge.arguments import naming, swapped
from dataflex.bridge.domains import held_out_rows, load_domains
from dataflex.bridge.tokenised import TokenisedPath, made_with
from dataflex.config.keys import RunConfig
from dataflex.config.registry import BY_DOMAIN
from dataflex.data.rows import (
    SOURCE_ROW,
    SOURCE_SET,
    Domains,
    RawRows,
    Rows,
    RunData,
)
from gradstore.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


OnData = Callable[[RunData, Any], None]


Arrange = Callable[[RawRows], "npt.NDArray[np.int64]"]


def dataset_loader(
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
        kept = data_args.tokenized_path is not None
        depends_on = made_with(stage, data_args, tokenizer, processor) if kept else {}
        if config.dataflex.train_type in BY_DOMAIN:
            module, domains = load_domains(
                config, data_args, training_args, call, _rows, depends_on
            )
        else:
            names = ", ".join(data_args.dataset or ())
            with naming(f"dataset {names}"), _arranged(data_args, files, arrange):
                module = _whole(data_args, training_args, call, depends_on)
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


def _whole(
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
    call: Callable[[Any, Any], dict[str, Any]],
    depends_on: Mapping[str, Any],
) -> dict[str, Any]:
    """Load all training sets by one call; rows of a folder, only if they would be made the same."""
    if data_args.tokenized_path is None or "://" in data_args.tokenized_path:
        return dict(call(data_args, training_args))
    kept = TokenisedPath(data_args, training_args, depends_on, "whole")
    return kept.whole(data_args, training_args, call)


def _load_targets(
    config: RunConfig,
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
    call: Callable[[Any, Any], dict[str, Any]],
    domains: Domains | None,
) -> tuple[Rows, ...]:
    """Load each target set by a separate call, as training data.

    LlamaFactory merges evaluation sets, and under `predict_with_generate` tokenises them without
    their responses: neither would do for gradients.
    """
    as_training = copy.copy(training_args)
    as_training.predict_with_generate = False
    sets = config.dataflex.target_dataset or tuple(data_args.eval_dataset or ())
    found = []
    for name in sets:
        one = copy.copy(data_args)
        one.dataset, one.eval_dataset, one.val_size = [name], None, 0.0
        one.tokenized_path, one.mix_strategy, one.interleave_probs = None, "concat", None
        with naming(f"target set {name!r}"):
            found.append(_rows(name, call(one, as_training)["train_dataset"]))
    if not sets and float(data_args.val_size) > 0 and domains is not None:
        found.append(held_out_rows(domains))
    elif not sets and float(data_args.val_size) > 0:
        one = copy.copy(data_args)
        if training_args.predict_with_generate:
            one.tokenized_path = None  # its validation rows are without their responses
        split = call(one, as_training).get("eval_dataset")
        if split is not None:
            found.append(_rows("validation", split))
    return tuple(found)


def _rows(name: str, dataset: Any) -> Rows:  # noqa: ANN401 - a datasets.Dataset
    if SOURCE_ROW not in (getattr(dataset, "column_names", None) or ()):
        return Rows(name, dataset)
    origins = tuple(zip(dataset[SOURCE_SET], dataset[SOURCE_ROW], strict=True))
    return Rows(name, dataset.remove_columns([SOURCE_SET, SOURCE_ROW]), origins)


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

    with swapped(loader, "_get_merged_dataset", merged):
        yield


@contextlib.contextmanager
def row_sources() -> Iterator[dict[str, Any]]:
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
            stack.enter_context(swapped(loader, name, replacement))
        yield files


class _SourceCarrier:
    """A dataset processor that keeps the origin of every row it does not drop."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - LlamaFactory's DatasetProcessor
        self.inner = inner

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Preprocess as `inner` does, row by row if rows carry an origin and are not packed."""
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
