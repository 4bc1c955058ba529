"""Questions about an answer, on a store of the embedded model: who helped, who hurt, and why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gradstore import open_store
from gradstore.errors import BadInput, ProvenanceMismatch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
ROW = 5


def ok(result: Any) -> Any:
    assert result.code == 0, result.err[-3000:]
    return result


def row_of(name: str, row: int) -> tuple[str, str]:
    """Prompt and response of a row of an embedded data set."""
    held = json.loads((TINY / "data" / f"{name}.json").read_text())[row]
    return "\n".join(filter(None, (held["instruction"], held["input"]))), held["output"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("explain")
    return {"model": folder / "model", "data": folder / "data", "run": folder / "run",
            "adam": folder / "run" / "gradstore", "bare": folder / "bare"}  # fmt: skip


@pytest.fixture
def built(places: dict[str, Path], cli: Any, config: Any) -> dict[str, Path]:
    """Two stores, made once: `adam` of checkpoints 2 and 4, `bare` of a fresh adapter, no text."""
    if not places["run"].exists():
        shutil.copytree(TINY / "model", places["model"])
        shutil.copytree(TINY / "data", places["data"])
        common = {
            "model_name_or_path": str(places["model"]), "dataset_dir": str(places["data"]),
            "output_dir": str(places["run"]), "max_samples": 48, "gradient_accumulation_steps": 1,
            "max_steps": 4,
        }  # fmt: skip
        ok(cli("train", config(**common, train_type="static", component_name=None,
                               component_params=None, target_dataset=None, warmup_step=None,
                               update_step=None, update_times=None)))  # fmt: skip
        ok(cli("gradstore", "build", config(**common, component_params={"proj_dim": 256})))
        sgd = {"proj_dim": 256, "gradient_type": "sgd"}
        fresh = {**common, "output_dir": str(places["run"].parent / "none"), "store_text": False}
        ok(cli("gradstore", "build", config(**fresh, gradstore=str(places["bare"]),
                                            component_params=sgd)))  # fmt: skip
    return places


@pytest.fixture(scope="module")
def opened() -> Iterator[dict[str, Any]]:
    """Explainers that the tests share, by name."""
    held: dict[str, Any] = {}
    yield held
    held.clear()


@pytest.fixture
def explainer(built: dict[str, Path], opened: dict[str, Any]) -> Any:
    """Of both checkpoints of the `adam` store, in this process."""
    from dataflex import open_model

    if "adam" not in opened:
        opened["adam"] = open_model(built["adam"], checkpoints="all")
    return opened["adam"]


@pytest.fixture
def bare(built: dict[str, Path], opened: dict[str, Any]) -> Any:
    """Of the store without text and checkpoints, with sgd features."""
    from dataflex import open_model

    if "bare" not in opened:
        opened["bare"] = open_model(built["bare"])
    return opened["bare"]


def test_a_training_row_is_the_first_helper_of_its_own_answer(
    built: dict[str, Path], bare: Any, cli: Any, tmp_path: Path
) -> None:
    prompt, response = row_of("train", ROW)
    found = bare.explain(prompt, response, top=3)
    assert (found.helped[0].row, found.helped[0].rank) == (ROW, 1)
    assert found.helped[0].score == pytest.approx(1.0, abs=2e-3), "only the store's rounding"
    assert found.helped[0].prompt is None, "this store has no text"
    output = tmp_path / "rows.jsonl"
    asked = cli("gradstore", "explain", built["adam"], "--prompt", prompt, "--response", response,
                "--top", 3, "--json", "-o", output)  # fmt: skip
    told = json.loads(ok(asked).out)
    assert told["generations"] == ["train/4"]
    assert told["helped"][0]["row"] == ROW
    assert told["helped"][0]["source"] == ["tiny_train", ROW]
    assert (told["helped"][0]["prompt"], told["helped"][0]["response"]) == (prompt, response)
    scores = [row["score"] for row in told["hurt"]]
    assert scores == sorted(scores)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["side"] for line in lines] == ["helped"] * 3 + ["hurt"] * 3
    assert lines[0]["row_response"] == response


def test_an_answer_that_is_a_target_row_scores_as_query_does(
    built: dict[str, Path], explainer: Any
) -> None:
    from gradstore import checkpoint_features, query_influence

    store = open_store(built["adam"])
    stored = query_influence(checkpoint_features(store, "all"), 3)
    scored: list[int] = []
    found = explainer.explain(*row_of("target", 3), on_rows=scored.append)
    assert sum(scored) == len(found.values), "each training row is counted once"
    assert found.generations == ("train/2", "train/4")
    np.testing.assert_allclose(found.values, stored.values, atol=1e-5)
    assert [row.row for row in found.helped] == stored.helped.tolist()


def test_why_adds_up_and_names_what_the_store_estimates(explainer: Any, bare: Any) -> None:
    prompt, response = row_of("target", 3)
    for asked, row in ((explainer, ROW), (bare, 7)):
        why = asked.why(row, prompt, response)
        for parts in (why.modules.values(), [t.part for t in why.row_tokens],
                      [t.part for t in why.query_tokens]):  # fmt: skip
            size = sum(map(abs, parts))
            assert abs(sum(parts) - why.exact) <= 1e-5 * size
        assert why.momentum == 0
        weights = [weight for weight, _ in why.checkpoints.values()]
        cosines = [each.cosine for _, each in why.checkpoints.values()]
        assert why.exact == pytest.approx(np.dot(weights, cosines))
        # A projection to 256 dimensions is off by 1/16 in the mean.
        assert why.row.score == pytest.approx(why.exact, abs=0.25)
        shown = "".join(token.text for token in why.row_tokens)
        assert row_of("train", row)[1] in shown
        assert all(not token.part for token in why.row_tokens if not token.is_target)
    assert why.to_dict()["store_score"] == why.row.score


def test_why_is_printed_as_tables_and_text(built: dict[str, Path], cli: Any) -> None:
    prompt, response = row_of("train", ROW)
    asked = cli("gradstore", "explain", built["adam"], "--prompt", prompt, "--response", response,
                "--why", ROW, "--generation", "train/2")  # fmt: skip
    out = ok(asked).out
    assert f"row {ROW} tiny_train[{ROW}]: exact influence" in out
    assert "model.layers.3.mlp.down_proj" in out
    assert response in out
    assert "\x1b" not in out, "colour is for terminals"


def test_threads_take_turns_and_get_what_each_asked(explainer: Any) -> None:
    questions = [row_of("train", row) for row in range(4)]
    alone = [explainer.explain(*question).values for question in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: explainer.explain(*question).values, questions))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_model_answers_where_no_response_is_given(
    built: dict[str, Path], explainer: Any, cli: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    prompt = row_of("target", 0)[0]
    said = explainer.answer(prompt)
    found = explainer.explain(prompt)
    assert found.generated
    assert found.response == said != ""
    np.testing.assert_array_equal(found.values, explainer.explain(prompt, said).values)
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": prompt}, {"prompt": "Sort.", "response": "1 2"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = cli("gradstore", "explain", built["adam"], "--file", file, "--json", "--top", 1)
    first, second = json.loads(ok(asked).out)
    assert (first["generated"], first["response"]) == (True, said)
    assert (second["generated"], second["response"]) == (False, "1 2")
    from dataflex.features import question_rows

    stop = explainer._loaded.tokenizer.eos_token_id
    monkeypatch.setattr(question_rows, "continuations", lambda *_, **__: [[stop]])
    with pytest.raises(BadInput, match="the model's own answer to the prompt is empty"):
        explainer.explain(prompt)


def test_questions_that_cannot_be_asked_are_refused(explainer: Any) -> None:
    long = "Sort the numbers. " * 40
    for ask in (lambda: explainer.explain(long, "1"), lambda: explainer.explain(long),
                lambda: explainer.why(0, long, "1")):  # fmt: skip
        with pytest.raises(BadInput, match=r"has(?:ve)? \d+ tokens.*cutoff_len 64|\d+ tokens.*64"):
            ask()
    with pytest.raises(BadInput, match="the response is empty"):
        explainer.explain("Sort.", "  ")
    for row in (48, -1):
        with pytest.raises(BadInput, match=rf"row {row} requested, train/4 has rows 0 to 47"):
            explainer.why(row, "Sort.", "1 2")
    with pytest.raises(BadInput, match="top is 0"):
        explainer.explain("Sort.", "1 2", top=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --prompt TEXT or --file"),
        (["--prompt", "a", "--file", "x.jsonl"], "give either --prompt TEXT or --file"),
        (["--file", "none.jsonl"], "file 'none.jsonl' cannot be read"),
        (["--prompt", "a", "-o", "x.txt"], "its name must end in one of"),
        (["--prompt", "a", "--top", "0"], "top is 0"),
        (["--prompt", "a", "--checkpoints", "some"], "checkpoints is 'some'"),
        (["--prompt", "a", "--generation", "train/3"], "has no committed generation 'train/3'"),
        (["--prompt", "a", "--generation", "target/tiny_target/4"], "name a train generation"),
        (["--prompt", "a", "model_nam=x"], "model_nam"),
    ],
)
def test_a_wrong_command_is_refused_before_a_model_is_loaded(
    built: dict[str, Path], cli: Any, options: list[str], message: str
) -> None:
    asked = cli("gradstore", "explain", built["adam"], *options)
    assert asked.code == 2
    assert message in asked.message


def test_a_row_is_made_of_the_stores_text_where_its_data_set_is_gone(
    built: dict[str, Path], explainer: Any, bare: Any
) -> None:
    """The one without text needs the file: it is missed, and a changed one is refused."""
    prompt, response = row_of("target", 3)
    file = built["data"] / "train.json"
    kept = file.read_bytes()
    try:
        file.unlink()
        assert explainer.why(ROW, prompt, response).row.row == ROW
        with pytest.raises(BadInput, match=rf"row {ROW} \(tiny_train\[{ROW}\]\) cannot be made"):
            bare.why(ROW, prompt, response)
        changed = json.loads(kept)
        changed[ROW]["output"] = "another answer"
        file.write_text(json.dumps(changed))
        assert bare.why(ROW + 1, prompt, response).row.row == ROW + 1
        with pytest.raises(ProvenanceMismatch, match=rf"row {ROW} \(tiny_train.*another row"):
            bare.why(ROW, prompt, response)
        file.write_text(json.dumps(changed[:ROW]))
        with pytest.raises(BadInput, match=rf"has {ROW} rows, and no row {ROW}"):
            bare.why(ROW, prompt, response)
    finally:
        file.write_bytes(kept)


def test_a_store_that_does_not_say_where_its_model_was_asks_the_checkpoint(
    built: dict[str, Path], monkeypatch: Any
) -> None:
    """Stores of earlier releases."""
    from dataflex import open_model
    from dataflex.features import loaded_from

    monkeypatch.setattr(loaded_from, "_recorded", lambda train: {})
    found = open_model(built["adam"]).explain(*row_of("train", ROW), top=1)
    assert found.helped[0].row == ROW
    with pytest.raises(BadInput, match="does not say which model it was made with"):
        open_model(built["bare"])


def test_a_model_that_moved_is_asked_for_and_one_that_changed_is_refused(
    built: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    """With every difference at once, exit 3."""
    from safetensors.torch import load_file, save_file

    asked = ["gradstore", "explain", built["adam"], "--prompt", "Sort.", "--response", "1 2",
             "--json"]  # fmt: skip
    moved, run = tmp_path / "moved", built["run"]
    built["model"].rename(moved)
    checkpoints = {step: run / f"checkpoint-{step}" for step in (2, 4)}
    try:
        gone = cli(*asked)
        assert gone.code == 2
        assert f"no longer at '{built['model']}'" in gone.message
        assert "--model PATH" in gone.message
        ok(cli(*asked, "--model", moved))
        weights = load_file(moved / "model.safetensors")
        weights["model.norm.weight"] += 1.0
        save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
        other = tmp_path / "checkpoint-4"
        shutil.copytree(checkpoints[2], other)
        shutil.copy(checkpoints[4] / "trainer_state.json", other)
        refused = cli(*asked, "--model", moved, "--checkpoint", other, "cutoff_len=63")
        assert refused.code == 3
        for field in ("base_model", "adapter_hash of train/4", "rows.cutoff_len"):
            assert f"{field} differs" in refused.message
        checkpoints[4].rename(tmp_path / "away")
        for place in ("adapter_config.json", "trainer_state.json"):
            (run / place).rename(tmp_path / place)
        older = ok(cli(*asked, "--model", TINY / "model"))
        assert "train/4 has no checkpoint to load: train/2 is asked" in older.err
        absent = cli(*asked, "--model", moved, "--generation", "train/4")
        assert absent.code == 2
        assert "no checkpoint of step 4, at which train/4 was made" in absent.message
        assert "those of steps 2" in absent.message
    finally:
        shutil.rmtree(built["model"], ignore_errors=True)
        shutil.copytree(TINY / "model", built["model"])
        if (tmp_path / "away").exists():
            (tmp_path / "away").rename(checkpoints[4])
        for place in ("adapter_config.json", "trainer_state.json"):
            if (tmp_path / place).exists():
                (tmp_path / place).rename(run / place)


def test_a_store_of_embeddings_alone_has_no_gradients_to_ask(tmp_path: Path) -> None:
    from gradstore.format.names import GenerationName
    from gradstore.format.records import RowSet, embedding_record, row_hash
    from gradstore.store.writer import StoreWriter

    space = "words"
    with StoreWriter(tmp_path / "store", space=space, provenance={"dim": 2}) as writer:
        name = GenerationName("train", 0, "", "")
        record = embedding_record(name, space=space, run_id="a", model_hash="b")
        rows = RowSet.from_hashes([row_hash([1, 2], [1, 2])])
        generation = writer.begin(record, rows, dim=2)
        one = np.ones(1)
        generation.write_unit(0, np.ones((1, 2), np.float32), one.astype(np.float32),
                              np.zeros(1, np.uint8), one.astype(np.int32))  # fmt: skip
        generation.commit()
    from dataflex import open_model

    with pytest.raises(BadInput, match="it has generations of space"):
        open_model(tmp_path / "store")


def test_a_served_store_loads_its_model_with_the_first_prompt_and_answers_as_the_command_does(
    built: dict[str, Path], explainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():  # Starlette's client names a deprecated alias of anyio
        warnings.simplefilter("ignore", DeprecationWarning)
        from fastapi.testclient import TestClient

    from dataflex.launch import explain
    from dataflex.launch.serving import ModelAtHand
    from gradstore.serve.app import create_app
    from gradstore.serve.served import Served

    loads = []
    load = explain.open_model
    monkeypatch.setattr(explain, "open_model", lambda *a, **k: loads.append(1) or load(*a, **k))
    prompt, response = row_of("train", ROW)
    served = Served(built["adam"], ModelAtHand(built["adam"]))
    with TestClient(create_app(served, "secret"), base_url="http://localhost") as client:
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/v1/stores").json()["stores"][0]["explains"] is True
        assert not loads
        form = {"prompt": prompt, "response": response, "top": 3}
        found = client.post("/v1/explain?wait=60", json=form)
        assert found.status_code == 200, found.text
        told = [line["row"] for line in found.json()["helped"]]
        assert told == [row.row for row in load(built["adam"]).explain(prompt, response, 3).helped]
        again = client.post("/v1/explain?wait=60", json={**form, "prompt": f"{prompt}!"})
        assert again.status_code == 200
        assert len(loads) == 1
        long = client.post("/v1/explain?wait=60", json={**form, "prompt": "word " * 5000})
        assert long.status_code == 422
        assert "cutoff_len" in long.json()["detail"]


def test_a_served_model_is_loaded_quietly_and_once_for_two_who_ask_at_once(
    built: dict[str, Path],
) -> None:
    """A real process: what other libraries say is chosen before they are imported."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("LLAMAFACTORY_VERBOSITY", "TQDM_DELAY")}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "dataflex", "gradstore", "serve", str(built["adam"]), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        process.stdout.readline()
        base, _, query = process.stdout.readline().strip().partition("/?token=")
        with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {query}"}) as client:

            def ask(prompt: str) -> Any:
                form = {"prompt": prompt, "response": "1 2 3"}
                return client.post("/v1/explain?wait=60", json=form, timeout=60)

            with ThreadPoolExecutor(2) as pool:
                answers = list(pool.map(ask, ["sort 3 1 2", "sort 2 1 3"]))
        assert [each.status_code for each in answers] == [200, 200]
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (130, "\nstopped.\n")
