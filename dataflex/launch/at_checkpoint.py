"""A run's rows and its model at one of its checkpoints, outside of training."""

from __future__ import annotations

from pathlib import Path

from dataflex.bridge import running
from dataflex.checkpoints.weights import ADAPTER_CONFIG, load_whole
from dataflex.config.keys import RunConfig


def load_at(
    config: RunConfig, checkpoint: Path | None, on_data: running.OnParsed, device: int = 0
) -> running.ExportInputs:
    """Load data and model as a training run would, in one process, with a checkpoint's weights.

    Args:
        config: the configuration of the run.
        checkpoint: a folder with an adapter, or with the whole model where the run trains no
            adapter; None for what the run starts from.
        on_data: as for `running.load_run`.
        device: number of the one to use, where several are visible.

    Raises:
        BadInput: the checkpoint does not fit the model.
    """
    if checkpoint is None or (checkpoint / ADAPTER_CONFIG).is_file():
        return running.load_run(config, checkpoint, on_data, device)
    # The model as configured, tokenizer included; only its weights are the checkpoint's.
    loaded = running.load_run(config, None, on_data, device)
    load_whole(loaded.model, checkpoint)
    return loaded
