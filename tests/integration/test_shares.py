"""Shares of a step: those of a run, of its checkpoints built later, and of another step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradstore import open_store

SHARES = {"proj_dim": 128, "gradient_type": "adam_share", "normalize": "none"}


def test_a_built_store_has_the_shares_of_the_run_and_no_other_steps(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Six rows a step, in three accumulated parts, clipped far below the gradient's norm."""
    clipped = {"component_params": SHARES, "max_grad_norm": 0.01}
    path = config(**clipped, update_times=1, save_steps=2)
    assert (ran := cli("train", path)).code == 0, ran.err[-3000:]
    trained = open_store(tmp_path / "run" / "gradstore").generation("train/2")
    share = trained.record.feature_options["share"]
    assert (share["rows"], share["max_grad_norm"]) == (6, 0.01)
    assert share["norm"] > 0.05
    # Accumulation is the run's own, whatever a later configuration says.
    built = config("build.yaml", **clipped, gradient_accumulation_steps=1)
    other = tmp_path / "other"
    at = f"gradstore_checkpoints={tmp_path / 'run' / 'checkpoint-2'}"
    assert (made := cli("gradstore", "build", built, at, f"gradstore={other}")).code == 0, made.err
    again = open_store(other).generation("train/2")
    assert again.record.feature_options == trained.record.feature_options
    np.testing.assert_allclose(again.norm, trained.norm, rtol=1e-5)
    refused = cli("gradstore", "build", built, at, f"gradstore={other}", "max_grad_norm=0.02")
    assert refused.code == 3, refused.err
    assert "share of a step: max_grad_norm differs" in refused.err
