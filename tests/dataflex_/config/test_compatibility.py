"""Configurations written for DataFlex 1.1.0 run as they are: names, keys and presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dataflex.config.presets import PACKAGED_PRESETS, resolve
from dataflex.config.registry import KINDS

THEIRS = Path(__file__).with_name("presets_1_1_0.yaml")
TRAIN_TYPES = {bucket: train_type for train_type, (bucket, _) in KINDS.items()}


#: Paths that are the user's own.
PATHS = {
    "doremi": {"reference_model_path": "examples/tiny/model"},
    "reuse_selector_scores": {"score_params": {"cache_path": "step_10.json"}},
}
PRESETS = [
    (bucket, name)
    for bucket, entries in yaml.safe_load(THEIRS.read_text()).items()
    for name in entries
]


@pytest.mark.parametrize(("bucket", "name"), PRESETS, ids=str)
def test_a_users_own_presets_file_resolves(bucket: str, name: str) -> None:
    assert resolve(TRAIN_TYPES[bucket], name, {}, THEIRS).build() is not None


@pytest.mark.parametrize(("bucket", "name"), PRESETS, ids=str)
def test_a_preset_of_that_name_is_packaged(bucket: str, name: str) -> None:
    packaged = yaml.safe_load(PACKAGED_PRESETS.read_text())
    assert name in packaged[bucket]
    needed = PATHS.get(name, {})
    assert resolve(TRAIN_TYPES[bucket], name, needed).build() is not None
