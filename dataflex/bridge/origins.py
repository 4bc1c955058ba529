"""Origin of rows: (data set, index in its file), carried through LlamaFactory's loader."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from dataflex.bridge.arguments import is_another_matter, reason_of, swapped
from dataflex.bridge.row_faults import ReadRows, misfit_told
from dataflex.data.rows import SOURCE_ROW, SOURCE_SET
from gradstore.errors import BadInput


@contextlib.contextmanager
def row_sources() -> Iterator[ReadRows]:
    """Carry (data set, index in its file) through loading, alignment and tokenisation.

    Both columns are added right after the file is read. Alignment maps row to row but drops all
    columns; tokenisation may drop rows, so it is run row by row and the survivors keep theirs.
    Yields the rows by data set as they were read, with columns that alignment drops.
    """
    from llamafactory.data import loader

    unnumbered = ReadRows()
    found = ReadRows(unnumbered=unnumbered)
    read, align, listed = loader.load_dataset, loader.align_dataset, loader.get_dataset_list
    processor_for = loader._get_dataset_processor

    def list_named(names: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        attributes = listed(names, *args, **kwargs)
        for name, each in zip(names or (), attributes, strict=True):
            each.source_name = name
        return attributes

    def read_numbered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        dataset = read(*args, **kwargs)
        if kwargs.get("streaming") or not hasattr(dataset, "add_column"):
            return dataset
        if SOURCE_ROW in dataset.column_names:
            raise BadInput(
                f"its rows have a column {SOURCE_ROW!r}, a name that DataFlex needs for the row's "
                "number: rename that column."
            )
        return dataset.add_column(SOURCE_ROW, list(range(len(dataset))))

    def align_numbered(dataset: Any, dataset_attr: Any, data_args: Any, training_args: Any) -> Any:  # noqa: ANN401
        name, numbered = dataset_attr.source_name, dataset
        if data_args.streaming or SOURCE_ROW not in dataset.column_names:
            numbered = None
        else:
            dataset = dataset.remove_columns(SOURCE_ROW)
        with misfit_told(dataset, dataset_attr, data_args):
            aligned = align(dataset, dataset_attr, data_args, training_args)
        if numbered is None:
            return aligned
        if data_args.tokenized_path is not None:
            unnumbered.add(name, numbered, aligned, dataset_attr)
            return aligned
        aligned = aligned.add_column(SOURCE_ROW, numbered[SOURCE_ROW][:])
        found.add(name, numbered, aligned, dataset_attr)
        return aligned.add_column(SOURCE_SET, [name] * len(aligned))

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
        yield found


#: Columns and tags that an entry of dataset_info.json may name.
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools", "images",
            "videos", "audios")  # fmt: skip
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag",
         "system_tag")  # fmt: skip


def entry_of(attributes: Any) -> dict[str, Any]:  # noqa: ANN401 - LlamaFactory's DatasetAttr
    """Give the entry of dataset_info.json that reads rows of the same columns; without a file."""

    def named(keys: tuple[str, ...]) -> dict[str, str]:
        return {key: found for key in keys if (found := getattr(attributes, key)) is not None}

    return {"formatting": attributes.formatting, "columns": named(_COLUMNS), "tags": named(_TAGS)}


class _SourceCarrier:
    """A dataset processor that keeps the origin of every row it does not drop."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - LlamaFactory's DatasetProcessor
        self.inner = inner

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Preprocess as `inner` does, row by row if rows carry an origin and are not packed."""
        if SOURCE_ROW not in examples:
            return dict(self.inner.preprocess_dataset(examples))
        if self.inner.data_args.packing:
            return self._packed(examples)
        found: dict[str, list[Any]] = {}
        with _drops_told_later(self.inner):
            for i in range(len(examples[SOURCE_ROW])):
                for key, values in self._one_row(examples, i).items():
                    found.setdefault(key, []).extend(values)
        return found

    def _one_row(self, examples: dict[str, list[Any]], i: int) -> dict[str, list[Any]]:
        """Preprocess a row of a batch; return the one row, or none, with its origin."""
        origin = {SOURCE_ROW: examples[SOURCE_ROW][i], SOURCE_SET: examples[SOURCE_SET][i]}
        try:
            one = self.inner.preprocess_dataset({k: [v[i]] for k, v in examples.items()})
        except Exception as error:  # of any kind: a template or a tokenizer's own code
            if is_another_matter(error):
                raise
            where = f"data set {origin[SOURCE_SET]!r}: row {origin[SOURCE_ROW]}"
            raise BadInput(
                f"{where} cannot be tokenised: {reason_of(error)}. Correct or remove the row."
            ) from error
        kept = len(next(iter(one.values()), []))
        return {**one, **{key: [value] * kept for key, value in origin.items()}}

    def _packed(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Pack a batch of rows; the first packed row has the origins of all that are in."""
        origins = {SOURCE_ROW, SOURCE_SET}
        bare = {key: values for key, values in examples.items() if key not in origins}
        with _drops_told_later(self.inner), _lengths_of(self.inner) as lengths:
            made = dict(self.inner.preprocess_dataset(bare))
        taken = list(range(len(examples[SOURCE_ROW])))
        if lengths is not None:  # stage sft, which leaves out rows without turns and long ones
            whole = [i for i in taken if len(examples["_prompt"][i]) % 2 == 1
                     and len(examples["_response"][i]) == 1]  # fmt: skip
            limit = self.inner.data_args.cutoff_len
            fits = zip(whole, lengths, strict=True)
            taken = [i for i, length in fits if length <= limit]
        rows = len(next(iter(made.values()), []))
        for key in origins if rows else ():
            made[key] = [[examples[key][i] for i in taken], *([] for _ in range(rows - 1))]
        return made

    def print_data_example(self, example: dict[str, list[int]]) -> None:
        """Pass through."""
        self.inner.print_data_example(example)


@contextlib.contextmanager
def _lengths_of(processor: Any) -> Iterator[list[int] | None]:  # noqa: ANN401
    """Collect the tokens of each row that a processor encodes; None if it encodes them together."""
    encode = getattr(processor, "_encode_data_example", None)
    if encode is None:
        yield None
        return
    lengths: list[int] = []

    def measured(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        encoded = encode(*args, **kwargs)
        lengths.append(len(encoded[0]))
        return encoded

    processor._encode_data_example = measured
    try:
        yield lengths
    finally:
        del processor._encode_data_example


@contextlib.contextmanager
def _drops_told_later(processor: Any) -> Iterator[None]:  # noqa: ANN401 - a DatasetProcessor
    """Keep LlamaFactory from a warning of its own for each row it drops, with the row's text.

    Dropped rows are told in one line for each set (`rows.py`). With its INFO it says both.
    """
    logger = logging.getLogger(type(processor).__module__)
    if logger.isEnabledFor(logging.INFO):
        yield
        return
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
