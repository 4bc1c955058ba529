"""Retraining of a run on a part of its rows, by plain LlamaFactory, and the target rows' losses.

Letters: n training rows, q queries (target rows with a target token, all target sets in a row).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.bridge import running
from dataflex.config.keys import RunConfig
from dataflex.data.rows import Rows, RunData
from dataflex.launch.plain_run import deciding, plain_arguments
from dataflex.models.passes import longest_row, own_labels
from dataflex.models.precision import autocast
from gradstore.capture.limits import token_budget
from gradstore.capture.per_sample import batch_losses
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.export.units import plan_batches

Floats = npt.NDArray[np.float64]

#: Orders of the rows of a retraining: the run's with the others left out, or one of their own.
IN_RUNS_ORDER, REDRAWN = "run", "redrawn"
ORDERS = (IN_RUNS_ORDER, REDRAWN)

#: Steps of a forecast; the first, which warms up, doesn't count.
_TIMED_STEPS = 4

_MAX_ROWS = 1024


class Retrainer:
    """The training of a configuration, on any of its rows, as `Bank.fill` calls it.

    In the run's order a model sees its rows as the run of all rows with the same seed does, the
    others taken out and batches filled up: two models differ by their rows, and not by the luck of
    a permutation as well. Redrawn, the trainer shuffles the rows that are left on their own.

    Args:
        config: a run; what its train_type does with the rows is left out, its steps are kept.
        data: its rows, as `running.load_run` gave them.
        device: kind of device it trains on, cpu or cuda.
        order: one of `ORDERS`.
    """

    def __init__(
        self, config: RunConfig, data: RunData, device: str, order: str = IN_RUNS_ORDER
    ) -> None:
        self._config, self._data = config, data
        self._device, self._order = device, order

    @property
    def configuration(self) -> dict[str, object]:
        """All that decides the losses besides rows and seed, for a bank."""
        return {**deciding(self._args(0), self._data, self._device), "order": self._order}

    def __call__(self, rows: npt.NDArray[np.int64], seed: int) -> Floats:
        """Train on rows (k,); return the mean token loss of each query, (q,).

        Raises:
            BadInput: LlamaFactory refuses the configuration.
            ProvenanceMismatch: the data sets changed since they were loaded.
        """
        return self._train(_Session(self._args(seed), self._data, rows, self._order)).losses

    def seconds(self, rows: npt.NDArray[np.int64], seed: int) -> float:
        """Forecast the seconds of a retraining on rows (k,), from its first steps."""
        began = time.perf_counter()
        session = self._train(
            _Session(self._args(seed), self._data, rows, self._order, _TIMED_STEPS)
        )
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
        self,
        args: dict[str, Any],
        data: RunData,
        rows: npt.NDArray[np.int64],
        order: str,
        stop: int = 0,
    ) -> None:
        self.args = args
        self.losses: Floats = np.empty(0)
        self.seconds_left = 0.0
        self._expected, self._rows, self._stop = data, rows, stop
        self._redrawn = order == REDRAWN

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
            def get_train_dataloader(self) -> Any:  # noqa: ANN401 - a DataLoader
                found = super().get_train_dataloader()
                if not session._redrawn:
                    batches = found.batch_sampler
                    batches.sampler = Remaining(batches.sampler, session._rows)
                return found

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
            if session._redrawn:
                kwargs["train_dataset"] = kwargs["train_dataset"].select(session._rows)
            trainer = Retrained(*args, **kwargs)
            trainer.remove_callback(PrinterCallback)
            if session._stop:
                trainer.add_callback(_stopwatch(session))
            return trainer

        return build


class Remaining(torch.utils.data.Sampler[int]):
    """Order of rows with all but some of them left out, in every epoch.

    Args:
        order: of all rows, each once an epoch.
        rows: (k,) those that remain.
    """

    def __init__(self, order: torch.utils.data.Sampler[int], rows: npt.NDArray[np.int64]) -> None:
        self._order, self._rows = order, frozenset(rows.tolist())

    def __iter__(self) -> Iterator[int]:
        return (row for row in self._order if row in self._rows)

    def __len__(self) -> int:
        """Return the number of rows that remain, k."""
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of all rows as their run does in that epoch."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)


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
