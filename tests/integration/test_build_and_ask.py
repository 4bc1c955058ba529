"""A store built in training or offline answers the same: info, verify, score, select, query."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradstore import open_store

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
SETS = "tiny_target_sort,tiny_target_date"


def ok(result: Any) -> Any:
    assert result.code == 0, result.err[-3000:]
    return result


def committed(store: Path) -> dict[str, str]:
    return {g.name: g.commit_sha for g in open_store(store).generations()}


def files_of(folder: Path, but: str = "") -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder below `folder`, except those in its folder `but`."""
    paths = sorted(folder.rglob("*"))
    kept = [p for p in paths if p.relative_to(folder).parts[0] != but]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in kept}


def selection(run: Path, step: int) -> dict[str, Any]:
    found = json.loads((run / "dataflex" / "selections" / f"step_{step}.json").read_text())
    return dict(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return {"run": folder / "run", "store": folder / "run" / "gradstore", "yaml": folder / "x.yaml"}


@pytest.fixture
def run(trained: dict[str, Path], cli: Any, config: Any) -> dict[str, Path]:
    """8 steps, selections at 2 and 5, checkpoints at 2, 4, 6, 8, two target sets; made once."""
    if not trained["run"].exists():
        path = config(
            output_dir=str(trained["run"]), target_dataset=SETS, gradient_accumulation_steps=1
        )
        shutil.copy(path, trained["yaml"])
        ok(cli("train", path))
    return trained


def scores_of(cli: Any, store: Path, *options: object) -> np.ndarray:
    told = json.loads(ok(cli("gradstore", "score", store, "--json", *options)).out)
    return np.array([np.nan if s is None else s for s in told["scores"]])


def test_training_selected_what_score_says(run: dict[str, Path], cli: Any) -> None:
    chosen = selection(run["run"], 5)
    scores = scores_of(cli, run["store"])
    rows = np.argsort(-scores, kind="stable")[: len(chosen["indices"])]
    assert rows.tolist() == chosen["indices"]
    np.testing.assert_array_equal(
        scores[rows].astype(np.float32), np.float32(chosen["metric"]["score"])
    )
    assert chosen["manifest"]["train"] == "train/5"


def test_select_writes_the_same_rows_with_their_sources(
    run: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    output = tmp_path / "selected.jsonl"
    chosen = selection(run["run"], 5)["indices"]
    ok(cli("gradstore", "select", run["store"], "-k", len(chosen), "-o", output))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in lines] == chosen
    assert [line["rank"] for line in lines] == list(range(1, len(chosen) + 1))
    keys = ["rank", "row", "score", "source", "row_hash", "prompt", "response"]
    assert all(list(line) == keys for line in lines)
    assert all(line["source"] == ["tiny_train", line["row"]] for line in lines)
    assert all(len(bytes.fromhex(line["row_hash"])) == 16 for line in lines)
    ok(cli("gradstore", "select", run["store"], "--fraction", "0.25", "-o", output))
    assert len(output.read_text().splitlines()) == 24


def test_info_has_the_schema_of_the_contract(run: dict[str, Path], cli: Any) -> None:
    told = json.loads(ok(cli("gradstore", "info", run["store"], "--json")).out)
    assert told["store_uuid"] == open_store(run["store"]).uuid
    assert told["schema_version"] == 2  # it keeps the text of its rows
    assert all(each["text"] for each in told["generations"])
    opened = open_store(run["store"])
    read = opened.texts(opened.generations()[0])
    assert read is not None
    assert all(text.prompt and text.response and text.data_set for text in read.read(range(3)))
    fields = {"name": str, "role": str, "step": int, "rows": int, "usable_rows": int, "dim": int,
              "dtype": str, "projection": dict, "committed": bool, "bytes": int}  # fmt: skip
    for entry in told["generations"]:
        assert {name: type(entry[name]) for name in fields} == fields
    by_name = {entry["name"]: entry for entry in told["generations"]}
    train = by_name["train/5"]
    assert (train["role"], train["rows"], train["usable_rows"]) == ("train", 96, 96)
    assert (train["dim"], train["dtype"], train["committed"]) == (128, "float16", True)
    assert train["projection"]["method"] == "sjlt"
    assert by_name["target/tiny_target_sort/5"]["role"] == "target"
    table = ok(cli("gradstore", "info", run["store"])).out
    assert "target/tiny_target_sort/5" in table


def test_verify_reads_every_file(run: dict[str, Path], cli: Any) -> None:
    told = json.loads(ok(cli("gradstore", "verify", run["store"], "--json")).out)
    assert told["ok"] is True
    assert told["faults"] == []
    assert told["files"] > 20
    assert told["bytes"] > 96 * 128 * 2


def test_query_names_who_helped_and_who_hurt(run: dict[str, Path], cli: Any) -> None:
    asked = cli("gradstore", "query", run["store"], "--target-row", 3, "--top", 5, "--json",
                "--target", "tiny_target_sort")  # fmt: skip
    told = json.loads(ok(asked).out)
    assert told["target"] == "target/tiny_target_sort/5"
    helped, hurt = ([entry["score"] for entry in told[side]] for side in ("helped", "hurt"))
    assert helped == sorted(helped, reverse=True)
    assert hurt == sorted(hurt)
    assert helped[0] > hurt[0]
    store = open_store(run["store"])
    train, target = store.generation("train/5"), store.generation(told["target"])
    x, q = train.read(0, 96), target.read(3, 4)[0]
    cosines = x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q)
    assert [entry["row"] for entry in told["helped"]] == np.argsort(-cosines)[:5].tolist()


def test_audit_finds_wrong_answers_and_writes_every_signal(
    run: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    output = tmp_path / "audit.parquet"
    asked = cli("gradstore", "audit", run["store"], "--json", "--top", 7, "-o", output)
    told = json.loads(ok(asked).out)
    assert told["generation"] == "train/5"
    assert told["checkpoints"] == [2, 5]
    assert told["targets"] == ["tiny_target_date", "tiny_target_sort"]
    assert (told["rows"], told["notes"]) == (96, [])
    table = pq.read_table(output).to_pylist()
    assert told["top"] == table[:7]
    rows = json.loads((TINY / "data" / "train.json").read_text())
    for line in table:
        origin = rows[line["source_row"]]
        assert line["prompt"] == f"{origin['instruction']}\n{origin['input']}"
        assert line["response"] == origin["output"]
        assert line["reasons"] or line["suspicion"] < 0.9
    wrong = np.array([rows[line["source_row"]]["skill"] == "noise" for line in table])
    assert 5 < wrong.sum() < 40
    # The chance that a wrong answer stands before a right one.
    assert (~wrong)[:, None].cumsum(0)[wrong].sum() < 0.1 * wrong.sum() * (~wrong).sum()
    screen = ok(cli("gradstore", "audit", run["store"], "--top", 3)).out
    assert table[0]["response"] in screen
    assert "96 rows, checkpoints 2, 5, 2 target set(s)" in screen


def test_checkpoints_and_subtasks_combine_as_e11_says(run: dict[str, Path], cli: Any) -> None:
    """The weighted sum over checkpoints first, then the mean over a sub-task, then max or mean."""
    store = open_store(run["store"])
    units: dict[str, np.ndarray] = {}
    for g in store.generations():
        values = g.read(0, g.rows)
        units[g.name] = values / np.linalg.norm(values, axis=1, keepdims=True)
    rates = np.array([store.generation(f"train/{s}").record.learning_rate for s in (2, 5)])
    weights = rates / rates.sum()
    by_set = []
    for name in ("tiny_target_date", "tiny_target_sort"):
        per_step = [units[f"train/{s}"] @ units[f"target/{name}/{s}"].T for s in (2, 5)]
        by_set.append(np.tensordot(weights, np.stack(per_step), axes=1).mean(axis=1))
    for aggregation in ("max", "mean"):
        expected = getattr(np.stack(by_set), aggregation)(axis=0)
        for which in ("all", "2"):
            found = scores_of(cli, run["store"], "--checkpoints", which,
                              "--aggregation", aggregation)  # fmt: skip
            np.testing.assert_allclose(found, expected, atol=2e-6)


def test_scores_go_to_parquet(run: dict[str, Path], cli: Any, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    output = tmp_path / "deep" / "scores.parquet"
    ok(cli("gradstore", "score", run["store"], "-o", output))
    table = pq.read_table(output).to_pydict()
    assert table["row"] == list(range(96))
    np.testing.assert_allclose(table["score"], scores_of(cli, run["store"]), atol=1e-7)
    assert set(table["source_set"]) == {"tiny_train"}
    assert all(table["usable"])
    assert set(table["best_subtask"]) <= {0, 1}


def test_chosen_rows_are_shown_and_written_with_their_text(
    run: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    ok(cli("gradstore", "select", run["store"], "-k", 3, "-o", tmp_path / "x.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    files = json.loads((TINY / "data/train.json").read_text())
    for line in lines:
        original = files[line["source"][1]]
        assert line["prompt"].startswith(original["instruction"])
        assert line["response"] == original["output"]
    told = ok(cli("gradstore", "query", run["store"], "--target-row", 0, "--top", 2)).out
    best = json.loads(ok(cli("gradstore", "query", run["store"], "--target-row", 0, "--top", 2,
                             "--json")).out)  # fmt: skip
    assert best["prompt"].split()[0] in told
    assert best["helped"][0]["response"].split()[0] in told


def test_a_selection_is_a_data_set_that_trains_as_its_rows_do(
    run: dict[str, Path], cli: Any, config: Any, tmp_path: Path
) -> None:
    """LlamaFactory makes of each written row the very tokens and labels that were scored."""
    from datasets import load_from_disk

    folder = tmp_path / "chosen"
    told = ok(cli("gradstore", "select", run["store"], "-k", 16, "--as-dataset", folder)).out
    assert f"dataset_dir={folder} dataset=tiny_train" in told
    rows = load_from_disk(folder)["tiny_train"]
    assert rows["dataflex_rank"][:] == list(range(1, 17))
    assert rows["dataflex_score"][:] == sorted(rows["dataflex_score"][:], reverse=True)
    own = {"dataset_dir": str(folder), "dataset": "tiny_train", "output_dir": str(tmp_path / "o")}
    ok(cli("train", config(**own, train_type="static", max_samples=None, max_steps=2,
                           target_dataset=None, eval_dataset=None)))  # fmt: skip
    info = json.loads((folder / "dataset_info.json").read_text())
    for name in SETS.split(","):  # the targets are not in that folder
        file = f"{name.removeprefix('tiny_target_')}.json"
        shutil.copy(TINY / "data/targets" / file, folder)
        info[name] = {"file_name": file}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    plain = {"component_params": {"proj_dim": 128, "gradient_type": "sgd"}}
    own["output_dir"] = str(tmp_path / "built")
    ok(cli("gradstore", "build", config(**own, target_dataset=SETS, max_samples=None, **plain)))
    (made,) = (g for g in open_store(tmp_path / "built" / "gradstore").generations()
               if g.role == "train")  # fmt: skip
    ok(cli("gradstore", "select", run["store"], "-k", 16, "-o", tmp_path / "x.jsonl"))
    chosen = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [bytes(h).hex() for h in made.row_hash] == [line["row_hash"] for line in chosen]
    again = cli("gradstore", "select", run["store"], "-k", 16, "--as-dataset", folder)
    assert again.code == 2
    assert "is not empty" in again.err
    neither = cli("gradstore", "select", run["store"], "-k", 16)
    assert neither.code == 2
    assert "--as-dataset" in neither.err


def test_chosen_conversations_are_read_again_as_they_were(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Tags, system text and earlier turns of a format of one's own; each row has the same hash."""
    rows = [
        {"talk": [{"who": "me", "says": f"Add {i}."}, {"who": "it", "says": f"{i}"},
                  {"who": "me", "says": "And one?"}, {"who": "it", "says": f"{i + 1}"}],
         "rule": "Be <b>brief</b>.\u202e", "kind": {"n": i}}
        for i in range(12)
    ]  # fmt: skip
    entry = {"file_name": "talks.json", "formatting": "sharegpt",
             "columns": {"messages": "talk", "system": "rule"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me",
                      "assistant_tag": "it"}}  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    (data / "talks.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"talks": entry}))
    plain = {"component_params": {"proj_dim": 128, "gradient_type": "sgd"}, "dataset": "talks",
             "target_dataset": "talks", "cutoff_len": 128, "max_samples": None}  # fmt: skip

    def hashes(folder: Path, name: str) -> list[str]:
        path = config(f"{name}.yaml", **plain, dataset_dir=str(folder),
                      output_dir=str(tmp_path / name))  # fmt: skip
        ok(cli("gradstore", "build", path))
        (made,) = (g for g in open_store(tmp_path / name / "gradstore").generations()
                   if g.role == "train")  # fmt: skip
        return [bytes(row).hex() for row in made.row_hash]

    whole = hashes(data, "whole")
    chosen = tmp_path / "chosen"
    ok(cli("gradstore", "select", tmp_path / "whole" / "gradstore", "-k", 5,
           "--as-dataset", chosen))  # fmt: skip
    lines = [json.loads(line) for line in (chosen / "talks.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in rows[0]} for line in lines] == [
        rows[line["kind"]["n"]] for line in lines
    ]
    assert hashes(chosen, "again") == [whole[line["kind"]["n"]] for line in lines]


def test_a_store_without_text_says_how_to_add_it(
    run: dict[str, Path], cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(max_samples=20, output_dir=str(tmp_path / "run"), store_text=False,
                  component_params={"proj_dim": 128, "gradient_type": "sgd"})  # fmt: skip
    ok(cli("gradstore", "build", path))
    store = tmp_path / "run" / "gradstore"
    assert not (store / "texts").exists()
    assert not any(each["text"] for each in open_store(store).info()["generations"])
    told = ok(cli("gradstore", "query", store, "--target-row", 0)).out
    assert "store_text: true" in told
    refused = cli("gradstore", "select", store, "-k", 2, "--as-dataset", tmp_path / "d")
    assert refused.code == 2
    assert "store_text: true" in refused.err
    ok(cli("gradstore", "build", path, "store_text=true"))  # adds it, and computes nothing anew
    told = ok(cli("gradstore", "query", store, "--target-row", 0)).out
    assert "store_text" not in told
    ok(cli("gradstore", "verify", store))


def test_build_reuses_what_training_made_and_adds_the_rest(
    run: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    before = committed(run["store"])
    assert {name.split("/")[-1] for name in before} == {"2", "5"}
    result = ok(cli("gradstore", "build", run["yaml"]))
    after = committed(run["store"])
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[-1] for name in after} == {"2", "4", "5", "6", "8"}
    again = ok(cli("gradstore", "build", run["yaml"]))
    assert committed(run["store"]) == after
    assert "rows" in result.err + again.err
    ok(cli("gradstore", "verify", run["store"]))


def test_build_from_checkpoints_of_plain_llamafactory(
    run: dict[str, Path], cli: Any, config: Any, tmp_path: Path
) -> None:
    """optimizer.pt numbers its parameters; the names must come out right."""
    path = config(train_type="static", max_samples=40, max_steps=4)
    ok(cli("train", path))
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()
    plain = files_of(tmp_path / "run")
    told = ok(cli("gradstore", "build", path, "label_smoothing_factor=0.1",
                  f"gradstore_checkpoints={tmp_path / 'run/checkpoint-2'}"))  # fmt: skip
    assert "gradstore build compares rows by the plain cross-entropy" in " ".join(told.err.split())
    ok(cli("gradstore", "build", path))  # the same builder, though nothing remembers it
    store = open_store(tmp_path / "run" / "gradstore")
    assert [g.name for g in store.generations() if g.role == "train"] == ["train/2", "train/4"]
    assert store.generation("train/4").usable.all()
    assert files_of(tmp_path / "run", but="gradstore") == plain


def test_a_command_that_only_reads_leaves_the_store_as_it_is(
    run: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    store = run["store"]
    before = files_of(run["run"])
    ok(cli("gradstore", "info", store))
    ok(cli("gradstore", "verify", store))
    ok(cli("gradstore", "score", store, "-o", tmp_path / "x.csv"))
    ok(cli("gradstore", "select", store, "-k", 3, "-o", tmp_path / "x.jsonl"))
    ok(cli("gradstore", "query", store, "--target-row", 0))
    assert files_of(run["run"]) == before


def test_both_sources_of_moments_give_the_same_features(
    run: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    """A checkpoint of a LESS run has its moments by name; without them optimizer.pt serves."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run["run"] / "checkpoint-2", checkpoint)
    shutil.rmtree(checkpoint / "dataflex")
    ok(cli("gradstore", "build", run["yaml"], f"gradstore={tmp_path / 'store'}",
           f"gradstore_checkpoints={checkpoint}"))  # fmt: skip
    built = open_store(tmp_path / "store").generation("train/2")
    made = open_store(run["store"]).generation("train/2")
    assert built.record.optimizer_hash == made.record.optimizer_hash
    assert built.record.adapter_hash == made.record.adapter_hash
    np.testing.assert_array_equal(built.read(0, 96), made.read(0, 96))


def test_plain_gradients_need_no_checkpoint_and_equal_a_first_selection(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """W = 0 selects before the first step, at the adapter that `build` starts from, too."""
    changes = {"max_samples": 40, "warmup_step": 0, "train_step": 1, "target_dataset": SETS,
               "component_params": {"proj_dim": 128, "gradient_type": "sgd"}}  # fmt: skip
    ok(cli("train", config(output_dir=str(tmp_path / "run"), **changes)))
    ok(cli("gradstore", "build", config(output_dir=str(tmp_path / "built"), **changes)))
    made, built = (open_store(tmp_path / name / "gradstore") for name in ("run", "built"))
    assert [g.name for g in made.generations()] == [g.name for g in built.generations()]
    assert len(built.generations()) == 3
    for g in built.generations():
        assert g.usable.all()
        np.testing.assert_array_equal(g.read(0, g.rows), made.generation(g.name).read(0, g.rows))
    scores = scores_of(cli, built.path)
    chosen = selection(tmp_path / "run", 0)["indices"]
    assert np.argsort(-scores, kind="stable")[: len(chosen)].tolist() == chosen


def test_direct_scores_order_rows_as_projected_ones_do(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """All rows are asked for, so that both orders are whole."""
    orders = {}
    for scoring in ("projected", "direct"):
        run = tmp_path / scoring
        path = config(
            output_dir=str(run), max_samples=60, train_step=3, warmup_step=2, update_step=10,
            component_params={"proj_dim": 4096, "scoring": scoring},
        )  # fmt: skip
        ok(cli("train", path))
        found = selection(run, 2)
        values = np.empty(60)
        values[found["indices"]] = found["metric"]["score"]
        orders[scoring] = values
    assert not (tmp_path / "direct" / "gradstore").exists()
    ranks = [np.argsort(np.argsort(values)) for values in orders.values()]
    assert np.corrcoef(*ranks)[0, 1] > 0.9
    assert np.abs(orders["direct"] - orders["projected"]).max() < 0.1


def test_a_source_is_the_raw_row_even_when_rows_were_dropped(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Beside a file from which the same rows were removed by hand, row by row the same hashes."""
    raw = json.loads((TINY / "data" / "train.json").read_text())[:50]
    dropped = {0, 7, 8, 30}
    spoilt = [{**row, "output": None} if i in dropped else row for i, row in enumerate(raw)]
    kept = [i for i in range(50) if i not in dropped]
    rows = {}
    for name, content in (("spoilt", spoilt), ("clean", [raw[i] for i in kept])):
        folder = tmp_path / name
        shutil.copytree(TINY / "data", folder)
        (folder / "train.json").write_text(json.dumps(content))
        path = config(
            dataset="tiny_train,tiny_target_heldout", dataset_dir=str(folder), max_samples=50,
            output_dir=str(tmp_path / f"run-{name}"),
            preprocessing_num_workers=2 if name == "spoilt" else None,
            component_params={"proj_dim": 128, "gradient_type": "sgd"},
        )  # fmt: skip
        ok(cli("gradstore", "build", path))
        output = tmp_path / f"{name}.jsonl"
        store = tmp_path / f"run-{name}" / "gradstore"
        ok(cli("gradstore", "select", store, "-k", 96, "-o", output))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        rows[name] = {tuple(line["source"]): line["row_hash"] for line in lines}
        assert len(rows[name]) == 96, "46 of 50 rows of one set, 50 of the other"
    for j, i in enumerate(kept):
        assert rows["spoilt"]["tiny_train", i] == rows["clean"]["tiny_train", j]
    for j in range(50):
        source = ("tiny_target_heldout", j)
        assert rows["spoilt"][source] == rows["clean"][source]


def test_a_validation_split_serves_as_the_target(cli: Any, config: Any, tmp_path: Path) -> None:
    """Its rows are not trained on, and keep their responses under predict_with_generate."""
    path = config(
        target_dataset=None, val_size=0.2, max_samples=50,
        component_params={"proj_dim": 128, "gradient_type": "sgd"},
    )  # fmt: skip
    ok(cli("gradstore", "build", path))
    store = open_store(tmp_path / "run" / "gradstore")
    train, target = store.generation("train/0"), store.generation("target/validation/0")
    assert (train.rows, target.rows) == (40, 10)
    assert target.usable.all()
    assert train.sources is not None
    assert target.sources is not None
    assert not set(train.sources) & set(target.sources)
