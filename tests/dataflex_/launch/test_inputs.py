"""A run's inputs: what is wrong with a model's or a data folder's own files is one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.config.keys import load
from dataflex.launch.inputs import check_inputs
from gradstore.errors import BadInput

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
ACCEPTED = ("model_name_or_path", "dataset_dir", "dataset", "output_dir", "do_train")


@pytest.mark.parametrize(
    ("content", "says"),
    [("[" * 50_000, "nests more than 100"), ("[" * 200 + "]" * 200, "nests more than 100"),
     ("[]", "no JSON object"), ("3", "no JSON object"), ("{", "Expecting")],
    ids=["open", "closed", "a list", "a number", "no JSON"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "dataset_info.json"])
def test_a_file_that_is_no_json_object_is_named(
    name: str, content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    model = tmp_path if name == "config.json" else TINY / "model"
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'out'}\nmodel_name_or_path: {model}\ndataset: rows\n"
        f"dataset_dir: {tmp_path}\ndo_train: true\n"
    )
    with pytest.raises(BadInput, match=says) as refused:
        check_inputs(load(path, [], ACCEPTED))
    assert name in str(refused.value)
