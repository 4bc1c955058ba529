"""A replay's states on disk: the same bits, and refused where they are another replay's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.launch.replay_states import States, check_states, remove_states
from gradstore.errors import DamagedData, ProvenanceMismatch
from gradstore.replay.kept import Backwards
from gradstore.replay.steps import State

CPU = torch.device("cpu")
ENDED = {"a": torch.arange(6.0).view(2, 3)}
KEYS: dict[str, Any] = {"learning_rate": 0.001, "segment": 3, "target_rows": {"t": "00ff"}}


def vectors(seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn(5, dtype=torch.float64) for _ in range(3))


def states(folder: Path, ended: Any = None, **changed: Any) -> States:
    return States(folder, {**KEYS, **changed}, ENDED if ended is None else ended, CPU)


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_what_is_kept_comes_back_to_the_bit_and_the_way_back_is_the_last_one(
    tmp_path: Path,
) -> None:
    kept = states(tmp_path / "states")
    assert kept.state(1) is None
    assert kept.backwards() is None
    kept.keep_state(1, State(vectors(1)))
    kept.keep_state(12, State(vectors(2)))
    found = np.random.default_rng(0).normal(size=(11, 4))
    for segments in (2, 1):
        kept.keep_backwards(Backwards(segments, [vectors(i) for i in range(11)], found / segments))

    again = states(tmp_path / "states")
    for number, seed in ((1, 1), (12, 2)):
        held = again.state(number)
        assert held is not None
        assert same(held.vectors, vectors(seed))
    done = again.backwards()
    assert done is not None
    assert done.segments == 1
    assert (done.found == found).all()
    assert all(same(given, vectors(i)) for i, given in enumerate(done.cotangents))
    assert len(done.cotangents) == 11


def test_states_of_another_configuration_are_refused_by_what_differs(tmp_path: Path) -> None:
    states(tmp_path)
    with pytest.raises(ProvenanceMismatch, match=r"learning_rate was 0.001, is 0.01") as caught:
        check_states(tmp_path, KEYS | {"learning_rate": 0.01, "target_rows": {"t": "00fe"}})
    assert len(caught.value.differences) == 2
    with pytest.raises(ProvenanceMismatch, match="target_rows"):
        states(tmp_path, target_rows={"t": "00fe"})


def test_states_of_a_training_that_ended_elsewhere_are_refused(tmp_path: Path) -> None:
    states(tmp_path).keep_state(1, State(vectors(1)))
    with pytest.raises(ProvenanceMismatch, match="ended with other parameters"):
        states(tmp_path, {"a": ENDED["a"] + 1e-6}).state(1)


def test_a_state_whose_description_was_removed_is_not_taken_for_another_replays(
    tmp_path: Path,
) -> None:
    states(tmp_path).keep_state(1, State(vectors(1)))
    (tmp_path / "states.json").unlink()
    with pytest.raises(ProvenanceMismatch, match="of another replay"):
        states(tmp_path, segment=4).state(1)


@pytest.mark.parametrize("name", ["states.json", "state-0001.safetensors"])
def test_a_changed_byte_is_damage(tmp_path: Path, name: str) -> None:
    states(tmp_path).keep_state(1, State(vectors(1)))
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedData, match=f"{name}.* is not as it was written"):
        states(tmp_path).state(1)


def test_removed_states_leave_no_folder_and_no_file_of_anybody_else_goes(tmp_path: Path) -> None:
    states(tmp_path / "a").keep_state(1, State(vectors(1)))
    remove_states(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    states(tmp_path / "b")
    (tmp_path / "b" / "mine.txt").write_text("kept")
    remove_states(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]
    remove_states(tmp_path / "c")


def test_removed_states_take_what_a_killed_write_left_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    states(folder).keep_state(1, State(vectors(1)))
    (folder / ".state-0002.safetensors.1a2b3c4d.partial").write_bytes(b"half")
    remove_states(folder)
    assert not folder.exists()
