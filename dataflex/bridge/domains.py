"""Loading by domain: each source of `dataset` on its own, in the user's order.

LlamaFactory would concatenate the sources before it tokenises them, and a packed row could then
hold two domains. Here it is asked once per source; the rows are put one after the other afterwards.
Nothing here imports LlamaFactory: its loader comes in as `Load`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.bridge.tokenised import TokenisedPath
from dataflex.config.keys import RunConfig
from dataflex.data.mixture import domain_of
from dataflex.data.rows import Domains, Rows
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset

#: LlamaFactory's loader: (DataArguments, TrainingArguments) -> train_dataset, eval_dataset.
Load = Callable[[Any, Any], Mapping[str, Any]]

#: Name and processed rows, with columns of origin -> rows without them.
AsRows = Callable[[str, Any], Rows]


@dataclass(frozen=True)
class Source:
    """One data set, processed.

    Attributes:
        train: what is trained on.
        validation: rows held out by `val_size`, processed for evaluation, or None.
        held_out: the same rows processed for training, or None.
    """

    train: Dataset
    validation: Dataset | None = None
    held_out: Dataset | None = None


def load_domains(
    config: RunConfig,
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    training_args: Any,  # noqa: ANN401
    load: Load,
    as_rows: AsRows,
    made_with: Mapping[str, Any],
) -> tuple[dict[str, Any], Domains]:
    """Load every source, and what is evaluated on.

    Args:
        config: the whole configuration.
        data_args: LlamaFactory's DataArguments.
        training_args: its TrainingArguments.
        load: its loader.
        as_rows: strips columns of origin.
        made_with: what processed rows depend on beside `data_args`, for `tokenized_path`.

    Returns:
        `train_dataset` with all rows, domain after domain, and `eval_dataset` where there is one;
        and whose row is whose.

    Raises:
        BadInput: a source cannot be loaded, or leaves no row to train on.
        ProvenanceMismatch: `tokenized_path` holds rows made otherwise.
    """
    from datasets import concatenate_datasets

    names = tuple(data_args.dataset or ())
    sources = _sources(data_args, training_args, load, made_with)
    module: dict[str, Any] = {
        "train_dataset": concatenate_datasets([sources[name].train for name in names])
    }
    evaluation = _evaluation(data_args, training_args, load, sources)
    if evaluation is not None:
        module["eval_dataset"] = evaluation
    held_out = {n: as_rows(n, s.held_out) for n, s in sources.items() if s.held_out is not None}
    for name in config.dataflex.mixer_eval_dataset:
        domain = str(domain_of(name, names))
        held_out[domain] = as_rows(name, _one(name, data_args, training_args, load).train)
    sizes = [len(sources[name].train) for name in names]
    of_row = np.repeat(np.arange(len(names), dtype=np.int64), sizes)
    return module, Domains(names, of_row, held_out)


def held_out_rows(domains: Domains) -> Rows:
    """Concatenate the held-out rows of all domains."""
    from datasets import concatenate_datasets

    parts = list(domains.held_out.values())
    origins = [part.sources for part in parts]
    known = None if None in origins else tuple(o for part in origins for o in part or ())
    return Rows("validation", concatenate_datasets([part.dataset for part in parts]), known)


def _sources(
    data_args: Any,  # noqa: ANN401
    training_args: Any,  # noqa: ANN401
    load: Load,
    made_with: Mapping[str, Any],
) -> dict[str, Source]:
    """Return every source by name, tokenized now or read from `tokenized_path`."""
    names = tuple(data_args.dataset or ())
    if data_args.tokenized_path is None:
        return {name: _one(name, data_args, training_args, load) for name in names}
    kept = TokenisedPath(data_args, training_args, made_with, "by domain")
    found = kept.read()
    if found is None:
        fresh = {name: _one(name, data_args, training_args, load) for name in names}
        found = {name: vars(source) for name, source in fresh.items()}
        if training_args.should_save:
            kept.write(found)
    return {name: Source(**found[name]) for name in names}


def _one(name: str, data_args: Any, training_args: Any, load: Load) -> Source:  # noqa: ANN401
    """Load one data set by a separate call, as training data."""
    one = copy.copy(data_args)
    one.dataset, one.eval_dataset, one.tokenized_path = [name], None, None
    one.mix_strategy, one.interleave_probs = "concat", None
    if name not in (data_args.dataset or ()):
        one.val_size = 0.0
    try:
        found = load(one, training_args)
        validation = held_out = found.get("eval_dataset")
        if validation is not None and training_args.predict_with_generate:
            # Evaluated by generating, a row has no response: as held-out rows they need one.
            as_training = copy.copy(training_args)
            as_training.predict_with_generate = False
            held_out = load(one, as_training)["eval_dataset"]
    except BadInput as error:
        raise BadInput(f"data set {name!r}: {error}") from error
    train = found["train_dataset"]
    if len(train) == 0:
        raise BadInput(
            f"data set {name!r} has no row left after preprocessing, and every domain needs one. "
            "Remove it from dataset, or check cutoff_len, packing and its rows."
        )
    return Source(train, validation, held_out)


def _evaluation(
    data_args: Any,  # noqa: ANN401
    training_args: Any,  # noqa: ANN401
    load: Load,
    sources: Mapping[str, Source],
) -> Any:  # noqa: ANN401 - a Dataset, or one per name
    """Return the Trainer's evaluation data: `eval_dataset`, or the rows held out by `val_size`."""
    from datasets import concatenate_datasets

    if data_args.eval_dataset:
        only = copy.copy(data_args)
        only.dataset, only.tokenized_path = None, None
        return load(only, training_args).get("eval_dataset")
    parts = {n: s.validation for n, s in sources.items() if s.validation is not None}
    if not parts:
        return None
    return parts if data_args.eval_on_each_dataset else concatenate_datasets(list(parts.values()))
