"""The embedded example at a chosen optimizer step, for benchmarks that look at its gradients.

Model, rows and collator come from `examples/train_lora/selectors/less.yaml`, loaded the way
`dataflex-cli` loads them; every skill's target set is a sub-task. Training is what the warm-up of a
run does: random rows without replacement, AdamW at the file's constant learning rate.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex.bridge import arguments, running

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

import numpy as np
import numpy.typing as npt
import torch

from dataflex.config.keys import load
from dataflex.data.rows import Rows, RunData
from gradstore.capture.per_sample import batch_losses
from gradstore.export.moments import AdamMoments
from gradstore.export.units import FeatureRows, plan_batches
from gradstore.format.codec import decode, encode

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "train_lora" / "selectors" / "less.yaml"
TINY = ROOT / "examples" / "tiny"
SKILLS = tuple(sorted(path.stem for path in (TINY / "data" / "targets").glob("*.json")))
TOKENS = 2048
BATCH_ROWS = 64  # a dense projection makes its matrix once per 64 rows

RowBatch = tuple[npt.NDArray[np.int64], dict[str, Any]]
Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass
class TinyRun:
    """One training run of the tiny model, paused between two steps.

    Attributes:
        model: with a fresh adapter that trains.
        data: the training rows and one target set per skill, in the order of `SKILLS`.
        collate: rows -> padded batch.
        skills: (n,) the skill of each training row, or "noise".
        learning_rate: constant.
        batch_size: rows of a step.
        seed: of the adapter and of the rows' order.
        step: optimizer steps taken by `train_to`.
        max_grad_norm: the Trainer's default.
        norms: of each step's gradient before it was clipped.
        step_tokens: padded tokens that go through the model at once in a step; None for all.
        batch_tokens: padded tokens of a batch that is only measured.
    """

    model: Any
    data: RunData
    collate: Any
    skills: npt.NDArray[np.str_]
    learning_rate: float
    batch_size: int
    seed: int
    step: int = 0
    max_grad_norm: float = 1.0
    norms: list[float] = field(default_factory=list)
    step_tokens: int | None = None
    batch_tokens: int = TOKENS
    _optimizer: torch.optim.AdamW | None = field(default=None, repr=False)

    @staticmethod
    def start(
        seed: int,
        output_dir: Path,
        *,
        data_dir: Path = TINY / "data",
        train: str = "tiny_train",
        targets: Sequence[str] = tuple(f"tiny_target_{skill}" for skill in SKILLS),
        settings: Sequence[str] = (),
    ) -> TinyRun:
        """Load model and data; `output_dir` stays empty.

        Args:
            seed: of the adapter and of the rows' order.
            output_dir: of the run.
            data_dir: LlamaFactory's `dataset_dir`.
            train: its training set, in a file of the same name without `tiny_`.
            targets: its target sets.
            settings: further overrides of the file, such as another model.
        """
        overrides = [
            f"model_name_or_path={TINY / 'model'}",
            f"dataset_dir={data_dir}",
            f"dataset={train}",
            f"target_dataset={','.join(targets)}",
            "eval_dataset=null",
            "do_eval=false",
            f"output_dir={output_dir}",
            f"seed={seed}",
            *settings,
        ]
        config = load(CONFIG, overrides, arguments.accepted_keys())
        with contextlib.redirect_stdout(io.StringIO()):  # LlamaFactory prints an example per set
            loaded = running.load_run(config, None, lambda *loaded: None)
        file = data_dir / f"{train.removeprefix('tiny_')}.json"
        rows = json.loads(file.read_text(encoding="utf-8"))
        sources = loaded.data.train.sources or ()
        return TinyRun(
            model=loaded.model,
            data=loaded.data,
            collate=beside(loaded.model, loaded.collate),
            skills=np.array([rows[index]["skill"] for _, index in sources]),
            learning_rate=float(config.get("learning_rate")),
            batch_size=int(config.get("per_device_train_batch_size")),
            seed=seed,
        )

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """(n,) training rows in the order that `train_to` takes them."""
        return np.random.default_rng(self.seed).permutation(len(self.data.train))

    def train_to(self, step: int) -> AdamMoments:
        """Take optimizer steps up to `step`, in the same order again; return Adam's moments."""
        order = self.order
        while self.step < step:
            start = self.step * self.batch_size
            here = np.arange(start, start + self.batch_size)
            self.take_step(self.data.train, order.take(here, mode="wrap"))
            self.step += 1
        return AdamMoments.from_optimizer(self.optimizer, self.model)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The run's AdamW, made at its first step."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(
                self.trained, lr=self.learning_rate, weight_decay=0.0
            )
        return self._optimizer

    def take_step(
        self, rows: Rows, chosen: npt.NDArray[np.int64], among: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Take one optimizer step on these rows.

        Args:
            rows: the set that they are of.
            chosen: positions of those that count.
            among: rows whose tokens the sum of the losses is divided by, as if those that are not
                chosen had weight 0; None takes the chosen ones.
        """
        self.model.train()
        parts = [np.arange(len(chosen))]
        if self.step_tokens is not None:
            parts = plan_batches(rows.lengths[chosen], self.step_tokens)
        batches = [self.collate([rows.dataset[int(i)] for i in chosen[part]])
                   for part in parts if len(part)]  # fmt: skip
        tokens = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches]
        total = sum(tokens)
        if among is not None:
            whole = self.collate([rows.dataset[int(i)] for i in among])
            total = int((whole["labels"][:, 1:] >= 0).sum())
        if not batches:  # a step of momentum alone
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
        for batch, count in zip(batches, tokens, strict=True):
            (self.model(**batch).loss * (count / total)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.norms.append(float(norm.detach()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Give parameters and optimizer back as they are now."""
        values = [p.detach().clone() for p in self.trained]
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.trained, values, strict=True):
                    parameter.copy_(value)
            self.optimizer.load_state_dict(state)

    def losses(self, rows: Rows, only: int | None = None) -> npt.NDArray[np.float64]:
        """(n,) mean loss of each row's target tokens, or of the first `only` rows."""
        found = np.full(only or len(rows), np.nan)
        for chosen in plan_batches(rows.lengths[: len(found)], self.batch_tokens, BATCH_ROWS):
            batch = self.collate([rows.dataset[int(i)] for i in chosen])
            found[chosen] = batch_losses(self.model, batch).loss.cpu().numpy()
        return found

    def batches(self, rows: Rows) -> Iterator[RowBatch]:
        """Every row once, as the export plans its batches."""
        for chosen in plan_batches(rows.lengths, self.batch_tokens, BATCH_ROWS):
            yield chosen, self.collate([rows.dataset[int(i)] for i in chosen])


def beside(model: torch.nn.Module, collate: Collate) -> Collate:
    """Make a collator whose batches lie on the model's device."""
    device = next(model.parameters()).device

    def collated(rows: list[Any]) -> dict[str, Any]:
        batch = collate(rows)
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    return collated


def gather(parts: Iterable[FeatureRows], n: int, d: int) -> npt.NDArray[np.float32]:
    """Join exported parts to one (n, d) matrix in the order of the data set.

    Raises:
        SystemExit: a row gave no feature; figures over the others would mean something else.
    """
    features = np.full((n, d), np.nan, dtype=np.float32)
    for part in parts:
        features[part.rows] = part.features
    if np.isnan(features).any():
        raise SystemExit("not every row gave a feature")
    return features


def as_stored(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n, d) features as a store gives them back: float16 with a scale per row."""
    usable = np.ones(len(features), dtype=bool)
    return decode(*encode(features, usable, "float16"), "float16")


@dataclass(frozen=True)
class Held:
    """Features in memory that `influence_scores` reads like a generation of a store."""

    features: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """How many rows, n."""
        return len(self.features)

    @property
    def dim(self) -> int:
        """Length of a row, d."""
        return int(self.features.shape[1])

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) all true."""
        return np.ones(self.rows, dtype=np.bool_)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop)."""
        return self.features[start:stop]
