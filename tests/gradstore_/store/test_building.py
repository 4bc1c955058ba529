"""`gradstore.build`: one call for a script that has a model and a list of rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project_reference
from torch import nn
from typer.testing import CliRunner

import gradstore
from gradstore.cli import app
from gradstore.errors import BadInput, ProvenanceMismatch, StoreBusy, StoreIOError
from gradstore.export import memory, projected
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.gradient_space import effective_seed
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batches
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange
from gradstore.scoring.as_dataset import write_dataset
from gradstore.store import building
from gradstore.store.verify import verify_store

SETTINGS = {"proj_dim": 32, "tokens_per_batch": 60}


class Build:
    """A call of `gradstore.build` on the tiny llama, and its changes."""

    def __init__(self, llama: Any, path: Path) -> None:
        self.model = llama.model()
        self.moments = llama.moments(self.model)
        self.train, self.target = llama.rows(40), llama.rows(6, seed=8)
        self.path = path

    def __call__(self, **changes: Any) -> Any:
        given = {"model": self.model, "by": None, "train": self.train, "target": self.target,
                 "moments": self.moments, "step": 7, **SETTINGS, **changes}  # fmt: skip
        positional = [given.pop(key) for key in ("model", "by", "train", "target")]
        return gradstore.build(*positional, self.path, **given)


@pytest.fixture
def build(llama: Any, tmp_path: Path) -> Build:
    return Build(llama, tmp_path / "deep" / "store")


def test_features_are_those_of_the_parts_put_together_by_hand(build: Build, llama: Any) -> None:
    made = build(target={"one": build.target, "two": build.target[:2]})
    assert (made.train, made.targets) == ("train/7", ("target/one/7", "target/two/7"))
    assert made.target_rows == 8
    assert made.tokens == sum(len(r["input_ids"]) for r in [*build.train, *build.target * 1]) + sum(
        len(r["input_ids"]) for r in build.target[:2]
    )
    store = gradstore.open_store(build.path)
    train = store.generation("train/7")
    spec = build_projection(build, 7)
    for name, rows, feature, moments in (
        ("train/7", build.train, "adam_marginal", build.moments),
        ("target/one/7", build.target, "sgd", None),
    ):
        lengths = [len(row["input_ids"]) for row in rows]
        recipe = Recipe(FeatureSpec(feature), spec, moments)
        batches = Batches(rows, llama.collate, lengths, 60)
        exact = compute_unit(build.model, batches, recipe, UnitRange(0, 0, len(rows)))
        stored = store.generation(name).read(0, len(rows))
        error = np.linalg.norm(stored - exact.features) / np.linalg.norm(exact.features)
        assert error < 1e-3, name  # float16
        np.testing.assert_allclose(store.generation(name).norm, exact.norm, rtol=1e-6)
        np.testing.assert_allclose(store.generation(name).loss, exact.loss, rtol=1e-6)
    assert train.record.optimizer_hash == build.moments.sha256()
    assert verify_store(build.path).ok
    assert len(gradstore.influence_scores(gradstore.checkpoint_features(store)).values) == 40


def test_units_have_as_many_rows_as_a_call_asks_for_and_a_build_that_was_begun_keeps_its_own(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, int]] = []

    def compute(model: Any, batches: Any, recipe: Any, unit: UnitRange, advance: Any) -> Any:
        if len(batches.dataset) == 40:
            if len(computed) == 2:
                raise StoreIOError("the disk is full")
            computed.append((unit.start, unit.stop))
        return compute_unit(model, batches, recipe, unit, advance)

    with monkeypatch.context() as full:
        full.setattr(building, "compute_unit", compute)
        with pytest.raises(StoreIOError, match="the disk is full"):
            build(unit_rows=16)
    assert computed == [(0, 16), (16, 32)]
    build(unit_rows=8)
    sizes = {
        each.name: each.plan.unit_rows for each in gradstore.open_store(build.path).generations()
    }
    assert sizes == {"target/target/7": 16, "train/7": 16}
    whole = gradstore.open_store(build.path).generation("train/7").read(0, 40)
    build.path = build.path.with_name("other")
    build()
    np.testing.assert_allclose(
        whole,
        gradstore.open_store(build.path).generation("train/7").read(0, 40),
        rtol=2e-2,
        atol=1e-3,
    )
    for refused in (0, True, (1 << 20) + 1):
        with pytest.raises(BadInput, match=f"unit_rows is {refused}"):
            build(unit_rows=refused)


def test_the_room_that_one_set_found_is_that_of_the_others(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """A device with room for 30 padded tokens: memory runs out in the first set alone."""
    sizes: list[int] = []

    def watch(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    build.model.register_forward_pre_hook(watch, with_kwargs=True)
    build(target={"one": build.train[:30], "two": build.train[5:]})
    assert sum(size > 30 for size in sizes) == 1
    assert sum("out of memory" in line for line in caplog.messages) == 1


def test_a_build_in_few_bits_is_scored_from_the_command_line_as_one_in_float32(
    build: Build,
) -> None:
    """To half a step of int8, and to 4.5 standard deviations of 1bit; no dtype joins another."""
    found, folder = {}, build.path
    for dtype in ("int8", "float32", "1bit"):
        build.path = folder / dtype
        build(proj_dim=2048, dtype=dtype)
        assert gradstore.open_store(build.path).generation("train/7").dtype == dtype
        tables = [folder / f"{dtype}.{name}.jsonl" for name in ("score", "select")]
        for command in (
            ["verify"],
            ["score", "-o", str(tables[0])],
            ["select", "-k", "5", "-o", str(tables[1])],
            ["query", "--target-row", "0"],
        ):
            result = CliRunner().invoke(app, [command[0], str(build.path), *command[1:]])
            assert result.exit_code == 0, result.output
        scores, chosen = (
            [json.loads(line) for line in table.read_text().splitlines()] for table in tables
        )
        found[dtype] = [line["score"] for line in sorted(scores, key=lambda line: line["row"])]
        best = sorted(range(40), key=lambda row: (-found[dtype][row], row))[:5]
        assert [line["row"] for line in chosen] == best
    for dtype, most in (("int8", 1e-3), ("1bit", 4.5 * (0.571 / 2048) ** 0.5)):
        np.testing.assert_allclose(found[dtype], found["float32"], rtol=0, atol=most)
    with pytest.raises(ProvenanceMismatch, match=r"dtype.*'?1bit'?.*float32"):
        build(proj_dim=2048, dtype="float32", step=9)


def build_projection(build: Build, step: int) -> Any:
    from gradkernels import ProjectionSpec

    p = sum(x.numel() for x in build.model.parameters() if x.requires_grad)
    return ProjectionSpec("sjlt", p=p, d=32, seed=effective_seed(42, step), s=8)


def test_a_repeated_call_computes_nothing_and_the_next_checkpoint_joins(build: Build) -> None:
    build(learning_rate=1e-3)
    before = gradstore.open_store(build.path).head
    again = build(learning_rate=1e-3)
    assert (again.tokens, again.train) == (0, "train/7")
    assert gradstore.open_store(build.path).head == before
    build.model.train()  # a state that says nothing of the features
    with torch.no_grad():
        next(p for p in build.model.parameters() if p.requires_grad).add_(0.1)
    build(step=9, learning_rate=3e-3)
    weights = [c.weight for c in gradstore.checkpoint_features(gradstore.open_store(build.path),
                                                               "all")]  # fmt: skip
    np.testing.assert_allclose(weights, [0.25, 0.75])


def test_interrupted_it_computes_only_what_is_missing(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, int]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        unit = args[3]
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append((unit.start, unit.stop))
        return projected.compute_unit(*args, **kwargs)

    monkeypatch.setattr(building, "compute_unit", counted)
    with pytest.raises(KeyboardInterrupt):
        build(unit_rows=16)
    assert computed == [(0, 6), (0, 16), (16, 32)]
    del computed[:]
    build(unit_rows=16)
    assert computed == [(32, 40)]


def test_the_model_and_every_random_state_are_left_as_they_were(build: Build) -> None:
    model = build.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained[:2]:
        parameter.grad = torch.ones_like(parameter)

    def state() -> Any:
        return (
            [(n, p.requires_grad, None if p.grad is None else p.grad.clone().tolist())
             for n, p in model.named_parameters() if p.requires_grad],
            [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
            random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            [p.detach().clone().tolist() for p in trained],
        )  # fmt: skip

    class Shuffling:
        """A collator that draws, as some do."""

        def __call__(self, rows: Any) -> Any:
            torch.rand(3), np.random.rand(), random.random()
            return building.padded(rows)

    before = state()
    build(by=Shuffling())
    assert state() == before


def test_texts_are_kept_as_they_came_or_decoded(build: Build, tmp_path: Path) -> None:
    rows = [{"prompt": "Add 1 and 2.", "response": "3"}, {"prompt": "x", "response": "y"}]
    from transformers import AutoTokenizer

    tiny = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    big = _embedding_for(build.model, len(tokenizer))
    build(model=big, by=tokenizer, train=rows, target={"t": build.target}, gradient_type="sgd")
    store = gradstore.open_store(build.path)
    texts = store.texts(store.generation("train/7")).read([1, 0])
    assert [(t.prompt, t.response) for t in texts] == [("x", "y"), ("Add 1 and 2.", "3")]
    assert (texts[0].data_set, texts[0].source_row) == ("train", 1)
    kept = store.texts(store.generation("train/7"))
    names = write_dataset(tmp_path / "chosen", np.array([1]), np.array([0.5, 0.25]), kept)
    assert names == ["train"]
    line = json.loads((tmp_path / "chosen" / "train.jsonl").read_text())
    assert line == {**rows[1], "dataflex_score": 0.25, "dataflex_rank": 1}
    info = json.loads((tmp_path / "chosen" / "dataset_info.json").read_text())["train"]
    assert info["columns"] == {"prompt": "prompt", "response": "response"}
    assert store.texts(store.generation("target/t/7")).read([0])[0].tokens == len(
        build.target[0]["input_ids"]
    )
    assert store.generation("train/7").provenance["tokenizer"]


def _embedding_for(model: Any, tokens: int) -> Any:
    model.resize_token_embeddings(tokens)
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad = False
    return model


@pytest.mark.parametrize("changes", [{}, {"by": "tokenizer", "store_text": False}])
def test_without_a_tokenizer_or_with_store_text_false_there_is_no_text(
    build: Build, changes: dict[str, Any]
) -> None:
    if changes:
        changes = {**changes, "by": _Tokenizer()}
    build(**changes)
    store = gradstore.open_store(build.path)
    assert store.texts(store.generation("train/7")) is None


def _moved(build: Build) -> dict[str, Any]:
    frozen = next(p for p in build.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.add_(1e-3)
    return {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda b: {"by": _Tokenizer()}, "tokenizer differs"),
        (lambda b: {"train": b.train[::-1]}, "train.rows differs: same rows, different order"),
        (lambda b: {"target": b.train[:3]}, "target.target.rows differs"),
        (lambda b: {"proj_dim": 64}, "projection.d differs"),
        (lambda b: {"proj_method": "rademacher"}, "projection.method differs"),
        (lambda b: {"seed": 1}, "projection.seed differs"),
        (_moved, "base_model differs"),
        (lambda b: {"run_id": "other"}, "was made by run gradstore.build, this is run other"),
    ],
)  # fmt: skip
def test_what_changed_since_is_refused_before_anything_is_computed(
    build: Build, change: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    monkeypatch.setattr(building, "compute_unit", None)
    changes = {"step": 8, **change(build)}
    with pytest.raises(ProvenanceMismatch) as caught:
        build(**changes)
    assert told in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.differences
    assert [g.step for g in gradstore.open_store(build.path).generations()] == [7, 7]


class _Tokenizer:
    """A tokenizer, as far as its files go."""

    def __call__(self, text: str) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def decode(self, ids: Any, **_: Any) -> str:
        return str(ids)

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_longer_rows_than_the_context_are_kept_out_and_a_set_of_them_refused(build: Build) -> None:
    long = {"input_ids": [5] * 65}  # the model takes 64
    build(train=[*build.train, long])
    status = gradstore.open_store(build.path).generation("train/7").status
    assert status.tolist() == [RowStatus.OK] * 40 + [RowStatus.TOO_LONG]
    with pytest.raises(BadInput) as caught:
        build(train=None, target={"long": [long, long]})
    assert "target set 'long' has no usable row among its 2: 2 longer than the model's context" in (
        str(caught.value)
    )


def test_a_further_target_set_needs_neither_moments_nor_training_rows(build: Build) -> None:
    build()
    made = build(train=None, target={"more": build.target[:4]}, moments=None)
    assert (made.train, made.targets) == ("", ("target/more/7",))
    store = gradstore.open_store(build.path)
    checkpoint = gradstore.checkpoint_features(store, targets=["more"])
    assert len(gradstore.influence_scores(checkpoint).values) == 40


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": []}, "'train' has 0 rows"),
        ({"target": {"x": []}}, "'x' has 0 rows"),
        ({"train": None, "target": None}, "one of them at least"),
        ({"target": {"train": [{"input_ids": [1, 2]}]}}, "a target set is named 'train'"),
        ({"train": [{"input_ids": [5, 99]}]}, "row 0, has token 99, the .* embeddings for 61"),
        ({"moments": None}, "needs the optimizer's Adam moments.*`sgd` or `sign`"),
        ({"moments": 5}, "a torch optimizer of the Adam family"),
        ({"step": -1}, "step is -1"),
        ({"proj_dims": 8}, "unknown 'proj_dims'; accepted are gradient_type, .*proj_dim"),
        ({"proj_dim": "8"}, "proj_dim is '8': Input should be a valid integer"),
        ({"proj_dim": 4, "sjlt_s": 8}, "settings of the build"),
        ({"model": "llama"}, "model is 'llama'; give a torch module"),
    ],
)  # fmt: skip
def test_bad_input_is_told_and_leaves_no_store(build: Build, changes: Any, told: str) -> None:
    with pytest.raises(BadInput, match=f"(?s){told}"):
        build(**changes)
    assert not build.path.exists()


def test_an_optimizer_serves_as_its_moments_and_one_without_is_refused(build: Build) -> None:
    trained = [p for p in build.model.parameters() if p.requires_grad]
    build(moments=torch.optim.AdamW(trained))
    with pytest.raises(BadInput, match=r"optimizer SGD keeps no exp_avg.*sgd` or `sign`"):
        build(moments=torch.optim.SGD(trained, lr=1e-3), step=8)
    assert build(moments=torch.optim.SGD(trained, lr=1e-3), step=8, gradient_type="sgd",
                 gradstore_run="plain").train == "plain/train/8"  # fmt: skip


def test_a_model_without_an_adapter_gives_features_of_its_own_weights(
    build: Build, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones that each row has alone; a resumed training finds its store again."""
    build.model = build.model.unload()
    for parameter in build.model.parameters():
        parameter.requires_grad = True
    adam = torch.optim.AdamW(build.model.parameters(), lr=1e-3)

    def step() -> None:
        build.model(**llama.collate(build.train[:4])).loss.backward()
        adam.step()
        adam.zero_grad()

    step()
    build(moments=adam, step=1)
    step()  # norms and embeddings move as well: they are no base that a store is tied to
    build(moments=adam, step=2)
    store = gradstore.open_store(build.path)
    told = store.generation("train/2").provenance["parameters"]
    names = {line.split()[0].split(".")[-2] for line in told}
    assert names == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    hashes = {store.generation(f"train/{g}").record.adapter_hash for g in (1, 2)}
    assert len(hashes) == 2
    whole = llama.gradients(build.model, build.target)
    taken, start, kept = set(names), 0, []
    for name, parameter in build.model.named_parameters():
        if name.split(".")[-2] in taken:
            kept.append(whole[:, start : start + parameter.numel()])
        start += parameter.numel()
    gradients = torch.cat(kept, dim=1).numpy()
    recorded = ProjectionSpec.from_dict(dict(store.generation("target/target/2").record.projection))
    expected = project_reference(gradients, recorded)
    stored = store.generation("target/target/2").read(0, len(build.target))
    assert np.linalg.norm(stored - expected) / np.linalg.norm(expected) < 1e-3  # float16
    with pytest.raises(ProvenanceMismatch, match="parameters"):
        build(moments=adam, step=3, gradient_modules="all")
    monkeypatch.setattr(memory, "free_ram", lambda: 1000)
    with pytest.raises(BadInput, match="take about"):
        build(moments=adam, step=3)


def test_a_model_that_trains_all_beside_its_adapter_or_nothing_is_refused(build: Build) -> None:
    for parameter in build.model.parameters():
        parameter.requires_grad = True
    with pytest.raises(
        BadInput, match=r"has an adapter, and all of its [\d,]+ parameters are trained"
    ):
        build()
    for parameter in build.model.parameters():
        parameter.requires_grad = False
    with pytest.raises(BadInput, match="no parameter of the model requires grad"):
        build()


def test_other_ranks_of_a_distributed_run_are_refused(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(BadInput, match="called by rank 1 of a distributed run"):
        build()
    monkeypatch.setenv("RANK", "0")
    assert build().train == "train/7"


def test_a_rank_that_is_a_worker_takes_what_the_others_left(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    alone, build.path = build.path, tmp_path / "shared"
    monkeypatch.setenv("RANK", "1")
    assert build(worker=gradstore.Worker(2, 2)).tokens > 0
    monkeypatch.setenv("RANK", "0")
    assert build(worker=gradstore.Worker(1, 2)).tokens == 0
    one, shared = (gradstore.open_store(path).generation("train/7") for path in (alone, build.path))
    np.testing.assert_array_equal(one.read(0, 40), shared.read(0, 40))


def test_a_worker_is_refused_while_a_process_has_the_store_to_itself(build: Build) -> None:
    build(train=None)
    provenance = gradstore.open_store(build.path).provenance()
    with gradstore.StoreWriter(build.path, provenance=provenance), pytest.raises(StoreBusy):
        build(worker=gradstore.Worker(1, 2))


def test_autocast_of_the_caller_is_followed_and_recorded(build: Build) -> None:
    build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build(gradstore_run="half")
    store = gradstore.open_store(build.path)
    full, half = store.generation("train/7"), store.generation("half/train/7")
    assert (full.record.autocast, half.record.autocast) == ("off", "bf16")
    assert np.abs(full.read(0, 40) - half.read(0, 40)).max() > 0


def test_gradstore_alone_serves_a_model_that_is_not_transformers(tmp_path: Path) -> None:
    """Nothing but torch: a module whose forward returns logits."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.lora_A = nn.Linear(6, 2, bias=False)
            self.head = nn.Linear(2, 11, bias=False)
            for part in (self.embed, self.head):
                part.requires_grad_(False)

        def forward(self, input_ids: Any, **_: Any) -> Any:
            return type("Out", (), {"logits": self.head(self.lora_A(self.embed(input_ids)))})()

    torch.manual_seed(0)
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    gradstore.build(Tiny(), None, rows, rows, tmp_path / "s", gradient_type="sgd", proj_dim=8)
    assert gradstore.open_store(tmp_path / "s").generation("train/0").usable.all()


def test_shares_of_a_step_are_kept_and_those_of_another_step_refused(build: Build) -> None:
    build(gradient_type="adam_share", step_rows=8, max_grad_norm=0.5)
    store = gradstore.open_store(build.path)
    kept = store.generation("train/7").record.feature_options["share"]
    assert (kept["rows"], kept["max_grad_norm"]) == (8, 0.5)
    assert kept["norm"] > 0.5
    assert kept["tokens"] > 1
    assert "share" not in store.generation("target/target/7").record.feature_options
    for tokens in (None, 4, 16):  # the estimate differs in its last digits, the share does not
        again = build(
            gradient_type="adam_share", step_rows=8, max_grad_norm=0.5, tokens_per_batch=tokens
        )
        assert (again.tokens, again.train) == (0, "train/7")
    with pytest.raises(ProvenanceMismatch) as refused:
        build(gradient_type="adam_share", step_rows=16, max_grad_norm=1.0, step=9)
    for said in (
        "step: rows differs",
        "has 8",
        "this run has 16",
        "max_grad_norm",
        "gradstore_run",
    ):
        assert said in str(refused.value)
    names = [generation.name for generation in gradstore.open_store(build.path).generations()]
    assert "target/target/9" not in names  # refused before any pass
    build(gradient_type="adam_share", step_rows=16, gradstore_run="other", run_id="other")
    build(step=9)  # other features of the same run are told apart as they were


def test_shares_need_the_rows_of_a_step_before_any_pass(build: Build) -> None:
    with pytest.raises(BadInput, match="gradient_type adam_share needs step_rows"):
        build(gradient_type="adam_share")
    assert not build.path.exists()


def test_a_build_in_a_bucket_has_the_rows_of_one_in_a_folder(
    build: Build, bucket: str, tmp_path: Path
) -> None:
    found = []
    for place in (bucket, tmp_path / "deep" / "store"):
        build.path = place  # type: ignore[assignment]
        build(train=build.train[:6], target=build.target[:2])
        generations = gradstore.open_store(place).generations()
        found.append([(each.name, each.raw(0).tobytes()) for each in generations])
    assert found[0] == found[1]
