"""Public functions given plain, wrong-typed or wrong-shaped arguments: they work or say why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec

import gradstore
from gradstore import (
    AdamMoments,
    AuditOptions,
    Batches,
    BuildSettings,
    CheckpointFeatures,
    FeatureIndex,
    FeatureSpec,
    GenerationRecord,
    GradientCapture,
    InnerProduct,
    Recipe,
    RowSet,
    StoreWriter,
    Text,
    UnitSink,
    Worker,
    audit,
    batch_losses,
    bm25_scores,
    build,
    checkpoint_features,
    compute_embedding_unit,
    compute_unit,
    export_features,
    fill,
    influence_scores,
    open_store,
    query_influence,
    read_unit_rows,
    row_hash,
    select_subset,
    select_top,
    write_selected,
)
from gradstore.errors import BadInput
from gradstore.export.pooling import attention_tokens
from gradstore.scoring.influence import subtask_influence

EYE = np.eye(2)
SPEC = ProjectionSpec("sjlt", p=6, d=8)
LINEAR = torch.nn.Linear(2, 2)
SGD = torch.optim.SGD(LINEAR.parameters(), lr=0.1)

#: A generation, as far as an index looks at it.
ROWS = SimpleNamespace(
    name="train/0", commit_sha="ab", rows=2, dim=2, usable=np.ones(2, bool),
    units=[(0, 2)], status=np.zeros(2, np.uint8),
    read=lambda start, stop: np.eye(2, dtype=np.float32)[start:stop],
)  # fmt: skip


def index() -> FeatureIndex:
    return FeatureIndex.build(ROWS, backend="torch")  # type: ignore[arg-type]


def one() -> list[CheckpointFeatures]:
    return [CheckpointFeatures(EYE, EYE)]


def record(**changes: Any) -> GenerationRecord:
    usual: dict[str, Any] = {"name": "train/0", "role": "train", "step": 0, "run_id": "r",
                             "adapter_hash": "a", "effective_seed": 0, "projection": {},
                             "feature": "sgd"}  # fmt: skip
    return GenerationRecord(**{**usual, **changes})


def exported(**changes: Any) -> list[Any]:
    usual = {"model": LINEAR, "batches": [], "features": FeatureSpec("sgd"), "projection": SPEC}
    return list(export_features(**{**usual, **changes}))


WORKS: dict[str, tuple[Callable[[], Any], Any]] = {
    "subset of arrays": (lambda: select_subset(one(), 1, "knn_uniform"), [0]),
    "subset k of numpy": (lambda: select_subset(one(), np.int64(2), "round_robin"), [0, 1]),
    "damping of numpy": (
        lambda: (
            influence_scores(
                one(),
                product=InnerProduct("none", "none", np.float32(2)),  # type: ignore[arg-type]
            ).values
        ),
        [0.5, 0.5],
    ),
    "scores list": (lambda: select_top([0.1, 0.2], 1), [1]),
    "scores whole": (lambda: select_top([1, 2], 1), [1]),
    "scores bfloat16": (lambda: select_top(torch.tensor([0.1, 0.2]).bfloat16(), 1), [1]),
    "k of numpy": (lambda: select_top([0.1, 0.2], np.int64(1)), [1]),
    "usable list": (lambda: select_top([0.1, 0.2], 1, usable=[True, False]), [0]),
    "features float64": (lambda: influence_scores(one()).values, [0.5, 0.5]),
    "features tensors": (
        lambda: (
            influence_scores(
                [CheckpointFeatures(torch.eye(2).double(), [torch.eye(2).bfloat16()])]
            ).values
        ),
        [0.5, 0.5],
    ),
    "features lists": (
        lambda: influence_scores([CheckpointFeatures([[2, 0], [0, 0]], [[[1, 0]]])]).usable,
        [True, False],
    ),
    "features whole": (
        lambda: influence_scores([CheckpointFeatures(EYE.astype(int), EYE[:1])]).values,
        [1.0, 0.0],
    ),
    "sizes of numpy": (
        lambda: influence_scores(one(), subtask_sizes=np.array([1, 1])).values,
        [1.0, 1.0],
    ),
    "queries lists": (lambda: index().search([[1, 0]], 1)[1][0], [0]),
    "queries tensor": (
        lambda: index().search(torch.ones(1, 2, requires_grad=True).bfloat16(), 1)[1][0],
        [0],
    ),
    "ids tensor": (
        lambda: list(row_hash(torch.tensor([1, 2]), torch.tensor([2, 3]))),
        list(row_hash([1, 2], [2, 3])),
    ),
}


@pytest.mark.parametrize("name", WORKS)
def test_plain_arguments_work(name: str) -> None:
    call, expected = WORKS[name]
    np.testing.assert_allclose(np.asarray(call(), dtype=float), expected, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "documents text": (lambda: bm25_scores("a", ["b"]), "documents is 'a'; give a list"),
    "queries numbers": (lambda: bm25_scores(["a"], [1]), "queries is of type list; give"),
    "store None": (lambda: open_store(None), "the store is None; give a path"),
    "store bytes": (lambda: open_store(b"x"), "give a path"),
    "writer path": (lambda: StoreWriter(None, provenance={}), "give a path"),
    "writer fields": (lambda: StoreWriter("x", provenance=None), "give a mapping of fields"),
    "writer space": (lambda: StoreWriter("x", provenance={}, space=3), "space is 3; give"),
    "store of scores": (lambda: checkpoint_features("runs/x"), r"what open_store\(path\) returns"),
    "generation str": (lambda: FeatureIndex.build("train/0"), "one of store.generations"),
    "generation array": (lambda: FeatureIndex.build(EYE), "one of store.generations"),
    "backend": (lambda: FeatureIndex.build(ROWS, backend="annoy"), r"auto \| faiss \| torch"),
    "query text": (lambda: index().search("a", 1), r"give \(q, 2\) numbers"),
    "query texts": (lambda: index().search([["a", "b"]], 1), r"give \(q, 2\) numbers"),
    "query ragged": (lambda: index().search([[1], [1, 2]], 1), r"give \(q, 2\) numbers"),
    "query shape": (lambda: index().search([[1, 2, 3]], 1), r"\(q, 2\) is needed"),
    "query k": (lambda: index().search([[1, 2]], "1"), "k must be a whole number"),
    "rows of text": (lambda: next(read_unit_rows("train/0")), "one of store.generations"),
    "chunk": (lambda: next(read_unit_rows(ROWS, 0.5)), "chunk_rows is 0.5; give"),
    "scores text": (lambda: select_top("abc", 1), "give one number per row"),
    "scores texts": (lambda: select_top(["a", "b"], 1), "give one number per row"),
    "scores complex": (lambda: select_top(np.array([1j, 2]), 1), "give one number per row"),
    "scores ragged": (lambda: select_top([[0.1], [0.2, 0.3]], 1), "different lengths"),
    "scores shape": (lambda: select_top(EYE, 1), "one score per row is needed"),
    "a result": (lambda: select_top(influence_scores(one()), 1), "Scores; give one number"),
    "usable rows": (lambda: select_top([0.1, 0.2], 1, usable=[0, 1]), "give True or False"),
    "usable short": (lambda: select_top([0.1, 0.2], 1, usable=[True]), "each of the 2 rows"),
    "k text": (lambda: select_top([0.1, 0.2], "1"), "k must be a whole number"),
    "no checkpoint list": (lambda: influence_scores(one()[0]), "a list of CheckpointFeatures"),
    "arrays alone": (lambda: influence_scores([EYE]), "a list of CheckpointFeatures"),
    "sub-tasks alone": (lambda: subtask_influence(None), "a list of CheckpointFeatures"),
    "train text": (lambda: CheckpointFeatures("a", EYE), "train is 'a'; give a generation"),
    "train 1-d": (lambda: CheckpointFeatures(np.ones(3), EYE), r"train has shape \(3,\); give"),
    "train ragged": (lambda: CheckpointFeatures([[1], [1, 2]], EYE), "different lengths"),
    "train bool": (lambda: CheckpointFeatures(EYE > 0, EYE), "holds bool, no numbers"),
    "targets None": (lambda: CheckpointFeatures(EYE, None), "targets is a NoneType; for each"),
    "targets 1-d": (lambda: CheckpointFeatures(EYE, [np.ones(2)]), "target set 0 has shape"),
    "weight": (lambda: CheckpointFeatures(EYE, EYE, "1"), "checkpoint_weights"),
    "sizes": (lambda: influence_scores(one(), subtask_sizes=2), "must be a list of whole numbers"),
    "subset": (lambda: select_subset(one(), 1, "best"), "subset is 'best'; Choose top or"),
    "subset k": (lambda: select_subset(one(), "1"), "k must be a whole number"),
    "subset quotas": (lambda: select_subset(one(), 1, quotas={"a": 1}), "these rows have none"),
    "subset features": (lambda: select_subset(EYE, 1), "a list of CheckpointFeatures"),
    "product": (lambda: influence_scores(one(), product="fisher"), "product is 'fisher'; give an"),
    "damping": (lambda: InnerProduct(damping="1"), "damping is '1'; give a finite number"),
    "device": (lambda: influence_scores(one(), device="gpu"), "device 'gpu' cannot be used"),
    "chunk rows": (lambda: influence_scores(one(), chunk_rows="4"), "chunk_rows is '4'"),
    "target row": (lambda: query_influence(one(), 0.5), "target_row is 0.5"),
    "target": (lambda: query_influence(one(), 0, target="dev"), "target is 'dev'"),
    "top": (lambda: query_influence(one(), 0, top=1.5), "top is 1.5"),
    "ids text": (lambda: row_hash("abc", [1]), r"give whole numbers \(t,\)"),
    "ids fractions": (lambda: row_hash([1.5], [1]), r"give whole numbers \(t,\)"),
    "ids one number": (lambda: row_hash(3, [1]), r"give whole numbers \(t,\)"),
    "ids of two rows": (lambda: row_hash([[1], [2]], [1]), r"give whole numbers \(t,\)"),
    "hashes list": (lambda: RowSet([b"a" * 16]), "RowSet.from_hashes makes it"),
    "hashes text": (lambda: RowSet.from_hashes(["a" * 16]), "the 16 bytes that row_hash"),
    "hashes short": (lambda: RowSet.from_hashes([b"a" * 15]), "the 16 bytes that row_hash"),
    "a hash alone": (lambda: RowSet.from_hashes(b"a" * 16), "the 16 bytes that row_hash"),
    "sources": (lambda: RowSet(np.zeros((1, 16), np.uint8), (1,)), "give a pair"),
    "record name": (lambda: record(name=3), "text such as 'train/16'"),
    "record rate": (lambda: record(learning_rate="x"), "give a number or None"),
    "kind": (lambda: FeatureSpec(kind="x"), "use adam_marginal"),  # type: ignore[arg-type]
    "correction": (lambda: FeatureSpec(bias_correction="yes"), "give True or False"),
    "recipe text": (lambda: Recipe("sgd", SPEC), "give a FeatureSpec"),
    "recipe mapping": (lambda: Recipe(FeatureSpec("sgd"), SPEC.to_dict()), "a ProjectionSpec"),
    "recipe optimizer": (lambda: Recipe(FeatureSpec("adam"), SPEC, SGD), "give AdamMoments"),
    "model text": (lambda: GradientCapture("m"), "model is 'm'; give a torch module"),
    "losses' model": (lambda: batch_losses("m", {}), "give a torch module"),
    "losses' batch": (lambda: batch_losses(LINEAR, [1]), "give a mapping of tensors"),
    "losses' labels": (lambda: batch_losses(LINEAR, {"labels": [[1]]}), r"give a tensor \(b, t\)"),
    "export's model": (lambda: exported(model="m"), "give a torch module"),
    "export's p": (lambda: exported(projection=ProjectionSpec("sjlt", p=9, d=8)), "with p=6"),
    "export's kind": (lambda: exported(features="sgd"), "give a FeatureSpec"),
    "export's batches": (lambda: exported(batches={"labels": 1}), "give pairs: positions"),
    "export's batch": (lambda: exported(batches=[{"labels": 1}]), "give pairs: positions"),
    "export's buffer": (lambda: exported(buffer_bytes="2GB"), "buffer_bytes is '2GB'"),
    "unit's recipe": (lambda: compute_unit(LINEAR, None, None, None), "recipe is None"),
    "unit's embed": (lambda: compute_embedding_unit(1, None, None, dim=3), "embed is 1"),
    "unit's batches": (
        lambda: compute_embedding_unit(attention_tokens, None, None, dim=3),
        r"give Batches\(rows, collate",
    ),
    "optimizer text": (lambda: AdamMoments.from_optimizer("adam", LINEAR), "a torch optimizer"),
    "no state": (lambda: AdamMoments.from_state_dict({}, []), r"what optimizer.state_dict\(\)"),
    "no names": (
        lambda: AdamMoments.from_state_dict(SGD.state_dict(), list(LINEAR.parameters())),
        "model.named_parameters",
    ),
    "collate": (lambda: Batches([1], None, [1]), "give a function"),
    "lengths": (lambda: Batches([1, 2], list, [1]), "for each of the 2 rows"),
    "lengths text": (lambda: Batches([1, 2], list, "ab"), "for each of the 2 rows"),
    "budget": (lambda: Batches([1], list, [1], token_budget="4"), "token_budget is '4'"),
    "data set": (lambda: Batches(3, list, [1]), "rows that have a length"),
    "sink": (lambda: UnitSink(None), "what StoreWriter.begin returns"),
    "audit's store": (lambda: audit("store"), "what open_store"),
    "audit's limits": (lambda: AuditOptions("3"), "neighbours is '3'"),  # type: ignore[arg-type]
    "audit's cosine": (lambda: AuditOptions(duplicate_cosine=1.5), "duplicate_cosine is 1.5"),
    "audit's similarity": (lambda: AuditOptions(text_similarity=None), "at most 1"),  # type: ignore[arg-type]
    "filling": (lambda: fill(None, len), "what StoreWriter.begin returns"),
    "build's model": (lambda: build("m", None, [], None, "s"), "give a torch module"),
    "build's path": (lambda: build(LINEAR, None, [], None, None), "the store is None; give a path"),
    "build's setting": (lambda: build(LINEAR, None, [], None, "s", dim=3), "unknown 'dim'"),
    "a build's number": (lambda: BuildSettings.of({"proj_dim": "8"}), "proj_dim is '8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_told_what_is_wanted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, says = REFUSED[name]
    with pytest.raises(BadInput, match=says):
        call()
    assert not list(tmp_path.iterdir()), "nothing is written before the arguments are looked at"


WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "path": ({"path": None}, "give a path"),
    "fractions": ({"rows": [0.0]}, "positions"),
    "no such row": ({"rows": [2]}, "from 0 to 1"),
    "from the end": ({"rows": [-1]}, "from 0 to 1"),
    "matrix": ({"rows": [[0]]}, "positions"),
    "texts": ({"scores": ["a", "b"]}, "one number per row"),
    "few sources": ({"sources": [("a", 1)]}, "for each of 2 rows"),
    "sources without sets": ({"sources": [1, 2]}, "the first of sources is 1"),
    "few hashes": ({"row_hashes": np.zeros((1, 16), np.uint8)}, r"uint8 \(2, 16\)"),
    "float hashes": ({"row_hashes": np.zeros((2, 16))}, r"uint8 \(2, 16\)"),
    "text hashes": ({"row_hashes": ["a", "b"]}, r"uint8 \(2, 16\)"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_does_not_fit_a_selection_is_not_written(name: str, tmp_path: Path) -> None:
    changes, says = WRITTEN[name]
    usual: dict[str, Any] = {"path": tmp_path / "a.jsonl", "rows": [0], "scores": [0.1, 0.2]}
    write_selected(**usual)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(BadInput, match=says):
        write_selected(**{**usual, **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question", "give Text"),
        (("p", "r", 1), "give Text"),
        (Text(None, "r", 1), "prompt is None"),  # type: ignore[arg-type]
        (Text("p", 3, 1), "response is 3"),  # type: ignore[arg-type]
        (Text("p", "r", 1.5), "tokens is 1.5"),  # type: ignore[arg-type]
        (Text("p", "r", 1, {}), "original is of type dict"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_text_is_not_kept(text: Any, says: str, tmp_path: Path) -> None:
    rows = RowSet.from_hashes([row_hash([1], [1])])
    with StoreWriter(tmp_path / "s", provenance={}) as writer:
        with pytest.raises(BadInput, match=says):
            writer.keep_texts(rows, [text])
        assert writer.store.head is None
        writer.keep_texts(rows, [Text("p", "r", np.int64(1))])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 4), "number is 0"),
        ((5, 4), "number is 5; give at most count, 4"),
        ((1, 1.5), "count is 1.5"),
        (("1", 4), "number is '1'"),
        ((1, 4, 0), "lease_seconds is 0"),
        ((1, 4, "60"), "lease_seconds is '60'"),
    ],
)
def test_a_worker_is_one_of_so_many(arguments: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=says):
        Worker(*arguments)
    with pytest.raises(BadInput, match=r"worker is '1/4'; give gradstore\.Worker"):
        StoreWriter(tmp_path / "s", provenance={}, worker="1/4")  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [0, -1, "newest", 1.5, True])
def test_a_number_of_checkpoints_is_at_least_one(which: Any, tmp_path: Path) -> None:
    from gradstore.scoring.pairing import _newest

    with pytest.raises(BadInput, match="checkpoints is"):
        _newest([1, 2], which, fewer=False)


def test_every_public_function_is_asked_here() -> None:
    asked = {name for name in gradstore.__all__ if name in globals()}
    assert asked == set(gradstore.__all__)
