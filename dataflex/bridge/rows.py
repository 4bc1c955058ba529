"""Rows as LlamaFactory processes them, each with its origin, and the target sets beside them."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from dataflex.bridge.arguments import as_bad_input, naming, swapped
from dataflex.bridge.domains import held_out_rows, load_domains
from dataflex.bridge.origins import entry_of
from dataflex.bridge.row_faults import ReadRows, find_dropped, find_faulty, remedy, told
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
from gradstore.format.sources import Sources

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


OnData = Callable[[RunData, Any], None]

#: A part of LlamaFactory's complaint that no row is left.
NO_ROW = "Cannot find valid samples"

_log = logging.getLogger(__name__)

Arrange = Callable[[RawRows], "npt.NDArray[np.int64]"]


def dataset_loader(
    config: RunConfig,
    original: Callable[..., dict[str, Any]],
    on_data: OnData,
    read: ReadRows,
    arrange: Arrange | None = None,
) -> Callable[..., dict[str, Any]]:
    """Wrap `get_dataset`: load targets beside the training rows, strip origins, report both."""
    guarded = as_bad_input(original)

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
            found: dict[str, Any] = guarded(
                template, model_args, data_args, training_args, stage=stage, tokenizer=tokenizer,
                processor=processor,
            )  # fmt: skip
            return found

        domains, noted = None, None
        kept = data_args.tokenized_path is not None
        depends_on = made_with(stage, data_args, tokenizer, processor) if kept else {}
        if config.dataflex.train_type in BY_DOMAIN:
            module, domains = load_domains(
                config, data_args, training_args, call, _rows, depends_on
            )
        else:
            names = ", ".join(data_args.dataset or ())
            told_why = _reasons_told(data_args.dataset or (), read, bool(data_args.packing))
            with naming(f"dataset {names}"), told_why, _arranged(data_args, read.files, arrange):
                module, noted = _whole(data_args, training_args, call, depends_on, read)
        if module.get("train_dataset") is None:
            raise BadInput(
                "there is no training data: set dataset, or name a tokenized_path that holds some."
            )
        train = _rows("train", module["train_dataset"])
        module["train_dataset"] = train.dataset
        used = [train, *_evaluation(module), *(domains.held_out.values() if domains else ())]
        dropped = _dropped(data_args.dataset or (), read, used, data_args, training_args)
        dropped |= _told_of_folder(noted, training_args)
        targets = _load_targets(config, data_args, training_args, call, domains, read)
        on_data(
            RunData(
                train, targets, tokenizer, str(data_args.template), data_args, stage, domains,
                read.files, dropped, read.aligned,
                {name: entry_of(each) for name, each in read.attributes.items()},
            ),
            training_args,
        )  # fmt: skip
        return module

    return load


def _evaluation(module: dict[str, Any]) -> list[Rows]:
    """Strip the origins of the rows for evaluation, in place; return the rows."""
    evaluation = module.get("eval_dataset")
    if isinstance(evaluation, dict):
        found = [_rows(name, dataset) for name, dataset in evaluation.items()]
        module["eval_dataset"] = {rows.name: rows.dataset for rows in found}
        return found
    if evaluation is None:
        return []
    rows = _rows("eval", evaluation)
    module["eval_dataset"] = rows.dataset
    return [rows]


def _dropped(
    names: Iterable[str],
    read: ReadRows,
    used: Sequence[Rows],
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
) -> dict[str, int]:
    """Count the rows of data sets that LlamaFactory dropped, by reason; one line for each set."""
    origins = [rows.sources if rows.packed is None else rows.packed for rows in used]
    if None in origins:
        return {}
    left = {origin for each in origins for origin in each or ()}
    counts: dict[str, int] = {}
    for name in dict.fromkeys(names):  # one may be named twice
        kept = {i for source, i in left if source == name}
        dropped = find_dropped(read, name, kept, bool(data_args.packing))
        if data_args.mix_strategy != "concat":
            dropped.pop("other", None)  # sound rows that interleaving leaves out
        if dropped and training_args.should_log:
            _log.warning("%s", told(name, dropped, len(read.files[name])))
        for reason, rows in dropped.items():
            counts[reason] = counts.get(reason, 0) + len(rows)
    return counts


@contextlib.contextmanager
def _reasons_told(names: Iterable[str], read: ReadRows, packing: bool) -> Iterator[None]:
    """Say why, where LlamaFactory complains that it dropped every row of a part."""
    try:
        yield
    except BadInput as error:
        if NO_ROW not in str(error):
            raise
        lines = []
        for name in dict.fromkeys(names):
            dropped = find_dropped(read, name, (), packing)
            dropped.pop("other", None)  # sound rows, of a part that is not at fault
            if dropped:
                lines.append(f"{told(name, dropped, len(read.files[name]))}. To mend it, "
                             f"{remedy(dropped)}.")  # fmt: skip
        if not lines:
            raise
        raise BadInput("\n".join(["no row is left.", *lines])) from error


def _whole(
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
    call: Callable[[Any, Any], dict[str, Any]],
    depends_on: Mapping[str, Any],
    read: ReadRows,
) -> tuple[dict[str, Any], Any]:
    """Load all training sets by one call; rows of a folder, only if they would be made the same.

    Returns:
        What LlamaFactory gives, and the folder's note of dropped rows.
    """
    if data_args.tokenized_path is None or "://" in data_args.tokenized_path:
        return dict(call(data_args, training_args)), None
    kept = TokenisedPath(data_args, training_args, depends_on, "whole")

    def dropped() -> dict[str, Any]:
        at_hand = read.unnumbered or read
        return {name: {"of": len(at_hand.files[name]), "rows": find_faulty(at_hand, name)}
                for name in at_hand.files if name in (data_args.dataset or ())}  # fmt: skip

    return kept.whole(data_args, training_args, call, dropped), kept.noted


def _told_of_folder(noted: Any, training_args: Any) -> dict[str, int]:  # noqa: ANN401
    """Count the rows that are not in a `tokenized_path`, by reason; one line for each set."""
    counts: dict[str, int] = {}
    for name, note in (noted or {}).items():
        if note["rows"] and training_args.should_log:
            _log.warning("%s", told(name, note["rows"], note["of"]))
        for reason, rows in note["rows"].items():
            counts[reason] = counts.get(reason, 0) + len(rows)
    return counts


def _load_targets(
    config: RunConfig,
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
    call: Callable[[Any, Any], dict[str, Any]],
    domains: Domains | None,
    read: ReadRows,
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
        with naming(f"target set {name!r}"), _reasons_told([name], read, bool(data_args.packing)):
            found.append(_rows(name, call(one, as_training)["train_dataset"]))
        if name not in (data_args.dataset or ()):  # else it was told as training data
            _dropped([name], read, found[-1:], data_args, training_args)
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


def one_row(
    data_set: str,
    number: int,
    call: Callable[[Any], dict[str, Any]],
    data_args: Any,  # noqa: ANN401 - LlamaFactory's DataArguments
    files: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Tokenise one row of a data set's file as training does; None if LlamaFactory drops it.

    Args:
        data_set: its name.
        number: index of the row in the file.
        call: LlamaFactory's `get_dataset` for data arguments.
        data_args: those of the run.
        files: what `row_sources` reads.

    Raises:
        BadInput: the set cannot be loaded, or has no such row.
    """
    one = copy.copy(data_args)
    one.dataset, one.eval_dataset, one.val_size, one.tokenized_path = [data_set], None, 0.0, None
    one.mix_strategy, one.interleave_probs, one.max_samples = "concat", None, None
    one.streaming, one.packing, one.preprocessing_num_workers = False, False, None

    def chosen(raw: RawRows) -> npt.NDArray[np.int64]:
        import numpy as np

        found = np.array([i for i, source in enumerate(raw.sources) if source[1] == number])
        if not len(found):
            raise BadInput(f"data set {data_set!r} has {len(raw):,} rows, and no row {number}")
        return found.astype(np.int64)

    with naming(f"data set {data_set!r}"), _arranged(one, files, chosen):
        try:
            rows = call(one)["train_dataset"]
        except BadInput as error:
            if NO_ROW in str(error):
                return None
            raise
    return dict(_rows(data_set, rows).dataset[0])


def _rows(name: str, dataset: Any) -> Rows:  # noqa: ANN401 - a datasets.Dataset
    if SOURCE_ROW not in (getattr(dataset, "column_names", None) or ()):
        return Rows(name, dataset)
    sets, numbers = dataset[SOURCE_SET][:], dataset[SOURCE_ROW][:]
    bare = dataset.remove_columns([SOURCE_SET, SOURCE_ROW])
    if not any(isinstance(each, list) for each in numbers):
        return Rows(name, bare, Sources.of(list(zip(sets, numbers, strict=True))))
    packed = zip(chain.from_iterable(sets), chain.from_iterable(numbers), strict=True)
    return Rows(name, bare, packed=tuple(packed))


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
            raise BadInput(
                "where its rows come from is unknown, so they cannot be put in order before they "
                "are tokenised: set component_params.apply_at: index."
            )
        sources = tuple(zip(dataset[SOURCE_SET], dataset[SOURCE_ROW], strict=True))
        return dataset.select(arrange(RawRows(sources, files)))

    with swapped(loader, "_get_merged_dataset", merged):
        yield
