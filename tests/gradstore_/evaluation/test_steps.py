"""The bank of single steps: kept by row and configuration, added to, refused where damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch
from gradstore.evaluation.steps import StepBank

SETTINGS = {"checkpoint": "a", "learning_rate": 1e-3}


def test_what_a_step_did_is_known_to_the_next_bank_and_grows(tmp_path: Path) -> None:
    bank = StepBank(tmp_path, SETTINGS)
    assert bank.known(7) == {}
    bank.keep(7, {0: -1.25, 4: -0.1})
    again = StepBank(tmp_path, SETTINGS)
    assert again.known(7) == {0: -1.25, 4: -0.1}  # to the bit
    again.keep(7, {2: -3.0})
    assert bank.known(7) == {0: -1.25, 4: -0.1, 2: -3.0}
    assert bank.known(8) == {}


def test_another_configuration_knows_nothing_and_loses_nothing(tmp_path: Path) -> None:
    first, other = StepBank(tmp_path, SETTINGS), StepBank(tmp_path, SETTINGS | {"checkpoint": "b"})
    first.keep(1, {0: -1.0})
    assert other.known(1) == {}
    other.keep(1, {0: -2.0})
    assert StepBank(tmp_path, SETTINGS).known(1) == {0: -1.0}
    assert StepBank(tmp_path, SETTINGS | {"checkpoint": "b"}).known(1) == {0: -2.0}


def test_an_entry_under_another_name_is_refused(tmp_path: Path) -> None:
    bank, other = StepBank(tmp_path, SETTINGS), StepBank(tmp_path, {"checkpoint": "b"})
    bank.keep(1, {0: -1.0})
    for folder, name in ((bank.folder, "2.json"), (other.folder, "1.json")):
        shutil.copy(bank.folder / "1.json", folder / name)
    for held, row in ((bank, 2), (other, 1)):
        with pytest.raises(ProvenanceMismatch, match="is of row 1 and configuration"):
            held.known(row)


def test_a_changed_byte_is_damage_and_no_number_is_no_entry(tmp_path: Path) -> None:
    bank = StepBank(tmp_path, SETTINGS)
    bank.keep(1, {0: -1.5})
    path = bank.folder / "1.json"
    path.write_bytes(path.read_bytes().replace(b"-1.5", b"-1.4"))
    with pytest.raises(DamagedData, match="is not as it was written"):
        bank.known(1)
    with pytest.raises(BadInput, match="finite"):
        bank.keep(2, {0: float("nan")})
    assert bank.known(2) == {}
