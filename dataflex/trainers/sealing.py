"""Checkpoints that are whole: sealed when every file is there, and only then replacing older ones.

The Trainer removes older checkpoints before LlamaFactory's callbacks have added their files to the
new one. So its own removal is held back, and a last callback seals the new checkpoint first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dataflex.checkpoints.folders import checkpoints
from dataflex.checkpoints.saving import clear_place, disk_faults, remove_older
from dataflex.checkpoints.seal import seal
from dataflex.run.ranks import Ranks
from dataflex.trainers.job import Run
from gradstore.errors import BadInput


class SealedCheckpoints:
    """Mixin before a Trainer, which must be given a `Sealer` as its last callback."""

    run: Run
    args: Any
    state: Any

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save into an empty folder; older checkpoints stay."""
        folder = checkpoint_folder(self.args, self.state)
        self.run.ranks.decide(lambda: clear_place(folder))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with disk_faults(folder):
                super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:  # noqa: ANN401
        """Load them; states of another optimizer are refused in one message."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"optimizer.pt or scheduler.pt of {str(checkpoint)!r} does not fit this run's "
                f"optimizer ({error}). Restore the optimizer's settings, or start a new run with "
                "overwrite_output_dir: true."
            ) from error


class Sealer(TrainerCallback):
    """Callback that seals each checkpoint, then applies `save_total_limit`.

    It must be the last one: LlamaFactory's write a processor's files into checkpoints.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Seal the checkpoint just saved, once every rank has written its files."""
        folder = checkpoint_folder(args, state)
        self.ranks.gather(lambda: None)

        def finish() -> None:
            if args.should_save:
                with disk_faults(folder):
                    seal(folder)
                best = state.best_model_checkpoint
                kept = {folder} if best is None else {folder, Path(best)}
                remove_older(checkpoints(Path(args.output_dir)), args.save_total_limit, kept)

        self.ranks.gather(finish)


def checkpoint_folder(args: Any, state: Any) -> Path:  # noqa: ANN401 - the Trainer's
    """Return the folder that the Trainer saves its present step in."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
