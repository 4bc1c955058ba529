"""What a trainer does around a checkpoint: older ones go when the new one is sealed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.checkpoints.seal import MANIFEST, is_sealed, seal
from dataflex.checkpoints.state import RunState
from dataflex.run.ranks import Ranks
from dataflex.trainers import sealing
from dataflex.trainers.sealing import SealedCheckpoints, Sealer
from gradstore.errors import BadInput, StoreIOError

RUN = "a run's id"


class Stock:
    """A Trainer as far as a checkpoint goes."""

    def __init__(self, args: Any, state: Any) -> None:
        self.args, self.state = args, state

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.save_total_limit is None, "older checkpoints would go before the seal"
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        schedule = (0, 1, 1)
        RunState(self.state.global_step, RUN, schedule, "sha").save(folder)
        self.save_model(str(folder))

    def save_model(self, output_dir: str) -> None:
        limit = self.args.save_total_limit
        (Path(output_dir) / "training_args.bin").write_text(f"limit {limit}")

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        raise ValueError("loaded state dict has a different number of parameter groups")


class Sealing(SealedCheckpoints, Stock):
    run = SimpleNamespace(ranks=Ranks(), run_id=RUN)  # type: ignore[assignment]


@pytest.fixture
def trainer(tmp_path: Path) -> Sealing:
    """One that has saved step 2, keeps one checkpoint, and is at step 4."""
    args = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=1, should_save=True)
    state = SimpleNamespace(global_step=2, best_model_checkpoint=None)
    trainer = Sealing(args, state)
    save(trainer)
    state.global_step = 4
    return trainer


def save(trainer: Sealing) -> None:
    trainer._save_checkpoint(None, trial=None)
    Sealer(Ranks(), RUN).on_save(trainer.args, trainer.state, None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_older_checkpoint_goes_once_the_new_one_is_sealed(
    trainer: Sealing, tmp_path: Path
) -> None:
    trainer._save_checkpoint(None, trial=None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert not is_sealed(tmp_path / "checkpoint-4")
    Sealer(Ranks(), RUN).on_save(trainer.args, trainer.state, None)
    assert names(tmp_path) == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / MANIFEST).is_file()


def test_an_older_checkpoint_stays_where_the_new_one_cannot_be_sealed(
    trainer: Sealing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(sealing, "seal", full)
    with pytest.raises(StoreIOError, match=r"checkpoint-4 cannot be saved .No space left"):
        save(trainer)
    assert is_sealed(tmp_path / "checkpoint-2")


def test_a_saved_training_args_has_the_users_limit(trainer: Sealing, tmp_path: Path) -> None:
    """It was None there, as while a checkpoint is saved: whoever goes on from it kept all."""
    assert (tmp_path / "checkpoint-2" / "training_args.bin").read_text() == "limit 1"
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "training_args.bin").read_text() == "limit 1"


@pytest.mark.parametrize(("of", "left"), [(RUN, [4, 6]), ("another", [4])])
def test_a_later_checkpoint_stays_if_it_is_of_this_run(
    of: str, left: list[int], trainer: Sealing, tmp_path: Path
) -> None:
    RunState(6, of, (0, 1, 1), "sha").save(tmp_path / "checkpoint-6")
    seal(tmp_path / "checkpoint-6")
    save(trainer)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_the_best_checkpoint_stays(trainer: Sealing, tmp_path: Path) -> None:
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    save(trainer)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_nothing_of_an_earlier_folder_is_in_a_new_checkpoint(
    trainer: Sealing, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"of a run of two")
    save(trainer)
    assert names(tmp_path / "checkpoint-4") == [
        "dataflex", "trainer_state.json", "training_args.bin"
    ]  # fmt: skip


def test_a_limit_is_put_back_when_saving_fails(
    trainer: Sealing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(Stock, "_save_checkpoint", fail)
    with pytest.raises(StoreIOError, match="checkpoint-4 cannot be saved"):
        save(trainer)
    assert trainer.args.save_total_limit == 1
    assert is_sealed(tmp_path / "checkpoint-2")


def test_the_states_of_another_optimizer_are_one_message(trainer: Sealing) -> None:
    with pytest.raises(BadInput, match=r"does not fit this run's optimizer .*parameter groups"):
        trainer._load_optimizer_and_scheduler("run/checkpoint-2")
