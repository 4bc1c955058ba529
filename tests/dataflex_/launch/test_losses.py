"""docs/losses.md, cell by cell: what each reader of losses does about each option of the loss."""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import activate_neftune
from transformers.trainer_pt_utils import LabelSmoother

from dataflex.bridge import arguments, running
from dataflex.config.keys import load
from dataflex.launch.losses import OPTIONS, Reader, loss_difference
from dataflex.launch.preflight import check, check_gradients
from gradstore.capture.per_sample import GradientCapture, batch_losses
from gradstore.errors import BadInput

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "train_lora"
VALUES = {"label_smoothing_factor": "0.1", "moe_aux_loss_coef": "0.01", "neftune_noise_alpha": "5",
          "ignore_pad_token_for_loss": "false"}  # fmt: skip

#: Examples that stand for a column of the table.
READERS = {
    "gradients": ("selectors/less", "selectors/icons", "selectors/cluster_less", "selectors/nice",
                  "gradstore build"),
    "losses of rows": ("selectors/loss", "selectors/delta_loss", "selectors/mirror",
                       "reorders/dynamic_sorting"),
    "observed losses": ("mixers/odm",),
    "weights": ("weighters/loss", "weighters/custom"),
}  # fmt: skip


def cells() -> list[tuple[str, str, str]]:
    """Option, reader and content of each cell of the table in the documentation."""
    lines = (ROOT / "docs" / "losses.md").read_text().splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    (_, *readers), _, *rows = table
    return [
        (name.split("`")[1], reader, cell)
        for name, *row in rows
        for reader, cell in zip(readers, row, strict=True)
    ]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@cache
def accepted() -> Any:
    return arguments.accepted_keys()


def outcome(example: str, option: str, caplog: pytest.LogCaptureFixture) -> str:
    """What a run of an example does about an option: refuses, says or follows."""
    built = example == "gradstore build"
    path = EXAMPLES / f"{'selectors/less' if built else example}.yaml"
    config = load(path, [f"{option}={VALUES.get(option, 'true')}"], accepted())
    try:
        if built:
            check_gradients(config)
            said = loss_difference(config.known, example, {Reader.GRADIENTS})
        else:
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                check(config)
            said = caplog.text
    except BadInput as refused:
        assert option in str(refused)  # noqa: PT017 - and for nothing else
        return "refuses"
    if "training and scoring use different losses" in said:
        assert option in said
        return "says"
    return "follows"


@pytest.mark.parametrize(("option", "reader", "promised"), cells())
def test_a_reader_does_what_the_table_says(
    option: str, reader: str, promised: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = {example: outcome(example, option, caplog) for example in READERS[reader]}
    word, _, but = promised.partition(";")
    expected = dict.fromkeys(READERS[reader], word.split(",")[0])
    if exception := re.search(r"`(\w+)` (\w+)", but):
        expected[f"selectors/{exception[1]}"] = exception[2]
    assert found == expected


def test_the_table_has_every_option_that_is_decided_about() -> None:
    assert {option.key for option in OPTIONS} <= {name for name, _, _ in cells()}


@pytest.mark.parametrize("example", ["selectors/near", "selectors/random", "mixers/static"])
def test_who_reads_no_loss_is_told_nothing(example: str, caplog: pytest.LogCaptureFixture) -> None:
    for option in OPTIONS:
        assert outcome(example, option.key, caplog) == "follows"


def test_a_stage_that_ignores_an_option_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    path, options = EXAMPLES / "selectors/loss.yaml", ["stage=pt", "packing=false"]
    with caplog.at_level(logging.WARNING):
        check(load(path, [*options, "use_dft_loss=true"], accepted()))
    assert "different losses" not in caplog.text


# -- what "follows" means -------------------------------------------------------------------------


@cache
def processed(folder: Path, *overrides: str) -> Any:
    """A model with an adapter, and rows with a history, as LlamaFactory processes them."""
    turns = [("human", "a b"), ("gpt", "c d e"), ("human", "f"), ("gpt", "g h")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    (folder / "rows.json").write_text(json.dumps([row, row]))
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    options = ["target_dataset=rows", "eval_dataset=null", "do_eval=false", "dataset=rows",
               f"dataset_dir={folder}", f"output_dir={folder / 'run'}",
               "overwrite_cache=true"]  # fmt: skip
    config = load(EXAMPLES / "selectors/less.yaml", [*options, *overrides], accepted())
    loaded = running.load_run(config, None, lambda *_: None)
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:  # zeros: the gradients of all A would be 0
            torch.nn.init.normal_(parameter, std=0.05)
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def predicted(batch: Any) -> int:
    """Number of labels; nothing predicts the first token."""
    return int((batch["labels"][:, 1:] != -100).sum())


def captured(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with GradientCapture(model) as capture:
        capture.capture(batch, lambda slot, block: found.update({slot.name: block[0].clone()}))
    return found


def by_autograd(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by name; autograd's own."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative distance of two whole gradients."""
    names = sorted(expected)
    assert len(found) == len(names)
    a = torch.cat([found[n] for n in sorted(found)])
    b = torch.cat([expected[n] for n in names])
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("option", "targets"), [("", "answers"), ("train_on_prompt=true", "all"),
                            ("mask_history=true", "last answer")]
)  # fmt: skip
def test_a_rows_loss_and_gradient_are_those_of_llamafactorys_own(
    option: str, targets: str, folder: Path
) -> None:
    loaded = processed(folder, *([option] if option else []))
    model = loaded.model.eval()
    batch = loaded.collate([loaded.data.train.dataset[0]])
    counted = {"answers": 1, "all": 2, "last answer": 0}
    labels = predicted(batch)
    assert labels == int(loaded.data.train.target_tokens[0])
    plain = predicted(processed(folder).collate([processed(folder).data.train.dataset[0]]))
    assert (labels > plain) + (labels >= plain) == counted[targets]
    loss = model(**batch).loss  # what CustomSeq2SeqTrainer minimises
    assert float(batch_losses(model, batch).loss[0]) == pytest.approx(loss.item(), rel=1e-5)
    assert distance(captured(model, batch), by_autograd(model, loss)) < 1e-5


def test_gradients_have_no_noise_of_neftune(folder: Path) -> None:
    loaded = processed(folder)
    model, batch = loaded.model.eval(), loaded.collate([loaded.data.train.dataset[0]])
    plain = captured(model, batch)
    handle = activate_neftune(model, 5.0)
    try:
        model.train()
        assert distance(captured(model, batch), plain) == 0
    finally:
        handle.remove()
        model.eval()


@pytest.mark.parametrize("option", ["use_dft_loss", "use_eaft_loss", "label_smoothing_factor"])
def test_an_option_that_is_told_has_other_gradients_indeed(option: str, folder: Path) -> None:
    from llamafactory.train.trainer_utils import dft_loss_func, eaft_loss_func

    loaded = processed(folder)
    model, batch = loaded.model.eval(), loaded.collate([loaded.data.train.dataset[0]])
    outputs = model(**batch)
    losses = {
        "use_dft_loss": lambda: dft_loss_func(outputs, batch["labels"]),
        "use_eaft_loss": lambda: eaft_loss_func(outputs, batch["labels"]),
        "label_smoothing_factor": lambda: LabelSmoother(0.1)(
            outputs, batch["labels"], shift_labels=True
        ),
    }
    assert distance(captured(model, batch), by_autograd(model, losses[option]())) > 1e-2
