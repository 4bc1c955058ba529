"""Paths of models: folders that are missing, and the command that brings them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.models.paths import missing_folder_faults, model_path_faults, reference_faults


def test_a_missing_folder_is_told_with_the_script_that_brings_it(tmp_path: Path) -> None:
    script = tmp_path / "prepare.py"
    missing = str(tmp_path / "model")
    (fault,) = missing_folder_faults("model_name_or_path", missing)
    assert "prepare.py" not in fault
    assert "Correct the path" in fault
    script.touch()
    for faults in (missing_folder_faults, model_path_faults):
        assert f"`python {script}`" in faults("key", missing)[0]
    assert f"`python {script}`" in reference_faults(missing, "key")[0]


@pytest.mark.parametrize("hub_id", ["gpt2", "org/model"])
def test_a_hub_id_is_no_missing_folder(hub_id: str) -> None:
    assert missing_folder_faults("model_name_or_path", hub_id) == []
    assert model_path_faults("key", hub_id) == reference_faults(hub_id, "key") == []
