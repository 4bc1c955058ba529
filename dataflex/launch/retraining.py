"""Retraining of a run on a part of its rows, by plain LlamaFactory, and the target rows' losses.

Letters: n training rows, q queries (target rows with a target token, all target sets in a row).
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.bridge import running
from dataflex.config.keys import RunConfig
from dataflex.data.rows import Rows, RunData
from dataflex.models.passes import longest_row, own_labels
from dataflex.models.precision import autocast
from gradstore.capture.limits import token_budget
from gradstore.capture.per_sample import batch_losses
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.export.units import plan_batches

Floats = npt.NDArray[np.float64]

#: What a retraining has no use for: it is trained, measured and forgotten.
_NOT_KEPT: Mapping[str, Any] = {
    "do_train": True,
    "do_eval": False,
    "do_predict": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "plot_loss": False,
    "push_to_hub": False,
    "disable_tqdm": True,
    "overwrite_output_dir": True,
    "resume_from_checkpoint": None,
}

#: Keys that decide no loss; `seed` is a part of each banked entry.
_WITHOUT_EFFECT = frozenset(_NOT_KEPT) | {
    "output_dir", "logging_steps", "logging_dir", "save_steps", "eval_steps",
    "save_total_limit", "save_only_model", "run_name", "overwrite_cache", "seed",
    "preprocessing_num_workers", "dataset_dir",
}  # fmt: skip

#: Steps of a forecast; the first, which warms up, doesn't count.
_TIMED_STEPS = 4

_MAX_ROWS = 1024


def plain_arguments(config: RunConfig) -> dict[str, Any]:
    """Return LlamaFactory's arguments of a run's plain training, of which nothing is kept."""
    args = {**config.llamafactory, **_NOT_KEPT}
    if (steps := config.dataflex.train_step) > 0:
        args["max_steps"] = steps
    return args


def deciding(args: Mapping[str, Any], data: RunData) -> dict[str, object]:
    """Return what decides the losses of a plain training besides its seed, as plain JSON.

    Args:
        args: as `plain_arguments` gave them.
        data: its rows.
    """
    held = {k: v for k, v in args.items() if k not in _WITHOUT_EFFECT}
    targets = {rows.name: _sha256(rows) for rows in data.targets}
    return {**held, "train_rows": _sha256(data.train), "target_rows": targets}


class Retrainer:
    """The training of a configuration, on any of its rows, as `Bank.fill` calls it.

    Args:
        config: a run; what its train_type does with the rows is left out, its steps are kept.
        data: its rows, as `running.load_run` gave them.
    """

    def __init__(self, config: RunConfig, data: RunData) -> None:
        self._config, self._data = config, data

    @property
    def configuration(self) -> dict[str, object]:
        """All that decides the losses besides rows and seed, for a bank."""
        return deciding(self._args(0), self._data)

    def __call__(self, rows: npt.NDArray[np.int64], seed: int) -> Floats:
        """Train on rows (k,); return the mean token loss of each query, (q,).

        Raises:
            BadInput: LlamaFactory refuses the configuration.
            ProvenanceMismatch: the data sets changed since they were loaded.
        """
        return self._train(_Session(self._args(seed), self._data, rows)).losses

    def seconds(self, rows: npt.NDArray[np.int64], seed: int) -> float:
        """Forecast the seconds of a retraining on rows (k,), from its first steps."""
        began = time.perf_counter()
        session = self._train(_Session(self._args(seed), self._data, rows, _TIMED_STEPS))
        return time.perf_counter() - began + session.seconds_left

    def _train(self, session: _Session) -> _Session:
        with tempfile.TemporaryDirectory() as folder:
            session.args["output_dir"] = folder
            running.run_replaced(self._config, session)
        return session

    def _args(self, seed: int) -> dict[str, Any]:
        return {**plain_arguments(self._config), "seed": seed}


class _Session:
    """One retraining; `running.Session`.

    Attributes:
        losses: (q,) after it.
        seconds_left: of the steps that were not taken, where it stops early.
    """

    arrange = None

    def __init__(
        self, args: dict[str, Any], data: RunData, rows: npt.NDArray[np.int64], stop: int = 0
    ) -> None:
        self.args = args
        self.losses: Floats = np.empty(0)
        self.seconds_left = 0.0
        self._expected, self._rows, self._stop = data, rows, stop

    def take_data(self, data: RunData, training_args: Any, tuned: Any) -> None:  # noqa: ANN401
        """Refuse rows that are not those the subsets were drawn from."""
        held = (self._expected.train, *self._expected.targets)
        for now, then in zip((data.train, *data.targets), held, strict=True):
            if not np.array_equal(now.row_set.hashes, then.row_set.hashes):
                raise ProvenanceMismatch(
                    f"the rows of {now.name!r} changed while models were retrained on them; start "
                    "again with another bank"
                )

    def trainer_for(self, base: type) -> Callable[..., Any]:
        """Build LlamaFactory's own trainer, on the rows of this retraining alone."""
        from transformers import PrinterCallback

        session = self

        class Retrained(base):  # type: ignore[misc]
            def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                found = super().train(*args, **kwargs)
                model = self.accelerator.unwrap_model(self.model)
                precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "off"
                session.losses = query_losses(
                    model, session._expected, self.data_collator, precision
                )
                return found

            def save_model(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
                """Keep nothing: a retrained model is worth the losses it gave."""

            def log_metrics(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
                """Print nothing: progress is told once per retraining."""

        def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            kwargs["train_dataset"] = kwargs["train_dataset"].select(session._rows)
            trainer = Retrained(*args, **kwargs)
            trainer.remove_callback(PrinterCallback)
            if session._stop:
                trainer.add_callback(_stopwatch(session))
            return trainer

        return build


def _stopwatch(session: _Session) -> Any:  # noqa: ANN401 - a TrainerCallback
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        first = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
            now = time.perf_counter()
            if state.global_step == 1:
                self.first = now
            elif state.global_step >= session._stop:
                step = (now - self.first) / (state.global_step - 1)
                session.seconds_left = step * (state.max_steps - state.global_step)
                control.should_training_stop = True

    return Stopwatch()


def queries_of(data: RunData) -> npt.NDArray[np.bool_]:
    """Mark the target rows that are queries: those with a target token, all sets in a row.

    Raises:
        BadInput: there is none.
    """
    found = np.concatenate([rows.target_tokens > 0 for rows in data.targets] or [np.empty(0, bool)])
    if not found.any():
        raise BadInput("no target row has a target token: set target_dataset to rows with answers.")
    return found


def query_losses(
    model: Any,  # noqa: ANN401 - a PreTrainedModel
    data: RunData,
    collate: Callable[[list[Any]], Any],
    precision: str,
) -> Floats:
    """Compute the mean loss over the target tokens of each query, (q,), in eval mode."""
    own, found = own_labels(collate), []
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad(), autocast(model, precision):
        for rows in data.targets:
            longest_row(model, rows)  # refuses rows whose losses would depend on their batch
            losses = np.full(len(rows), np.nan)
            for chosen in plan_batches(rows.lengths, 2 * token_budget(model), _MAX_ROWS):
                batch = own([rows.dataset[int(i)] for i in chosen])
                batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
                losses[chosen] = batch_losses(model, batch).loss.double().cpu().numpy()
            found.append(losses)
    model.train(training)
    return np.concatenate(found)[queries_of(data)]


def store_differs(store: Path, rows: Rows, hashes: npt.NDArray[np.uint8]) -> None:
    """Raise ProvenanceMismatch unless a store's rows are those of the configuration, in order."""
    if not np.array_equal(rows.row_set.hashes, hashes):
        raise ProvenanceMismatch(
            f'store "{store}" holds {len(hashes):,} rows for {rows.name!r} that are not the '
            f"{len(rows):,} of the configuration; give the configuration that the store was "
            "built with"
        )


def _sha256(rows: Rows) -> str:
    return hashlib.sha256(rows.row_set.hashes.tobytes()).hexdigest()
