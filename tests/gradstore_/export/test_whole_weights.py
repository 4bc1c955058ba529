"""Features of whole weights: projected part by part, the same as the whole gradient projected."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradkernels import ProjectionSpec, project_reference
from transformers import LlamaConfig, LlamaForCausalLM

from gradstore.capture import dense
from gradstore.capture.chosen import Modules
from gradstore.capture.per_sample import GradientCapture
from gradstore.errors import BadInput
from gradstore.export import memory, projected
from gradstore.export.combined import WeightedRow, WeightedSums, combined_gradients
from gradstore.export.features import FeatureMap, FeatureSpec, Kind
from gradstore.export.gradient_space import GradientSpace
from gradstore.export.kronecker_fit import fit_factors
from gradstore.export.memory import PassMemory, check_memory, free_ram, pass_memory
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments
from gradstore.export.projected import export_features
from gradstore.export.settings import GradientSettings
from gradstore.export.share import OptimizerStep, StepShare, expected_share
from gradstore.export.units import Batches
from gradstore.format.plans import UnitRange

SHARE = StepShare(4, 1.0, 9.0, 2.0)
USUAL_ELEMENTS = dense.CPU_ELEMENTS


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dense, "CPU_ELEMENTS", 1000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(**config: Any) -> Any:
    """A tied Llama without an adapter."""
    torch.manual_seed(0)
    usual = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "pad_token_id": 0, "tie_word_embeddings": True, "attention_bias": True}  # fmt: skip
    made: Any = LlamaForCausalLM(LlamaConfig(**{**usual, **config}))  # type: ignore[no-untyped-call]
    return made


def gradients(net: Any, rows: Any, modules: Modules) -> tuple[torch.Tensor, Any]:
    """(n, p) float32 by autograd, one row at a time, and the slots."""
    with GradientCapture(net, modules) as capture:
        slots = capture.slots
    names = {slot.name for slot in slots}
    parameters = [p for n, p in net.named_parameters() if n in names]
    found = []
    for row in rows:
        logits = net(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]))
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found), slots


def moments_of(net: Any) -> AdamMoments:
    generator = torch.Generator().manual_seed(9)
    constants = AdamConstants(0.9, 0.999, 1e-8, 10)

    def some(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    return AdamMoments({
        name: ParameterMoments(some(p.shape), some(p.shape) ** 2, constants)
        for name, p in net.named_parameters()
    })  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("method", "modules"), [("sjlt", "linear"), ("rademacher", "all")])
@pytest.mark.parametrize("kind", ["sgd", "sign", "adam", "adam_marginal", "adam_share"])
def test_a_feature_is_the_projection_of_the_whole_feature(
    kind: Kind,
    method: Any,
    modules: Modules,
    fused: bool,
    llama: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`fused`: as on a GPU, where the projection makes features."""
    monkeypatch.setattr(projected, "FUSED", ("cpu",) if fused else ())
    net, rows = model(), llama.rows(5)
    whole, slots = gradients(net, rows, modules)
    share = SHARE if kind == "adam_share" else None
    spec = FeatureSpec(kind, share=share, modules=modules)
    moments = moments_of(net) if spec.needs_moments else None
    tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in rows])
    feature_map = FeatureMap(spec, slots, moments)
    for slot in slots:
        span = slice(slot.start, slot.start + slot.numel)
        whole[:, span] = feature_map.apply_(slot, whole[:, span].clone(), tokens)
    projection = ProjectionSpec(method, p=whole.shape[1], d=64, seed=4)
    expected = project_reference(whole.double().numpy(), projection)
    found = np.full((5, 64), np.nan, np.float32)
    norms = np.full(5, np.nan)
    for part in export_features(net, llama.batches(rows, 2), features=spec, projection=projection,
                                moments=moments, buffer_bytes=4):  # fmt: skip
        found[part.rows], norms[part.rows] = part.features, part.norm
    if kind == "sign":  # of numbers that are 0 but for rounding, too
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
        assert (cosines / np.linalg.norm(expected, axis=1)).min() > 0.999
        return
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(norms, np.linalg.norm(whole.double(), axis=1), rtol=2e-5)


@pytest.mark.parametrize(("buffer_bytes", "streams"), [(2 << 30, False), (1 << 16, True)])
def test_a_dense_projection_gathers_rows_only_where_whole_gradients_fit(
    buffer_bytes: int, streams: bool, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, rows = model(), llama.rows(4)
    _, slots = gradients(net, rows[:1], "linear")
    projection = ProjectionSpec("rademacher", p=sum(s.numel for s in slots), d=8)
    kept: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> torch.Tensor:
        kept.append(int(np.prod(shape[0])) if isinstance(shape[0], tuple) else 0)
        return empty(*shape, **options)

    monkeypatch.setattr(projected.torch, "empty", counted)
    parts = list(export_features(net, llama.batches(rows, 2), projection=projection,
                                 features=FeatureSpec("sgd", modules="linear"),
                                 buffer_bytes=buffer_bytes))  # fmt: skip
    assert len(parts) == (2 if streams else 1)
    assert (max(kept, default=0) >= projection.p) is not streams


def test_sums_of_gradients_and_shares_of_a_step_take_the_same_parameters(llama: Any) -> None:
    net, rows = model(), llama.rows(4)
    whole, slots = gradients(net, rows, "linear")
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    lengths = [len(row["input_ids"]) for row in rows]
    made = WeightedRow(0, rows, [0.5, -1.0, 2.0, 0.25], lengths, sum(counts))
    sums = WeightedSums([made], llama.collate, token_budget=60)
    ((_, found),) = list(combined_gradients(net, sums, FeatureSpec("sgd", modules="linear")))
    weights = torch.tensor(made.weights) * torch.tensor(counts)
    expected = (weights[:, None] * whole).sum(0, keepdim=True)
    assert found.shape == (1, sum(slot.numel for slot in slots))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    share = expected_share(net, llama.batches(rows, 2), OptimizerStep(1, 0.0), "linear")
    per_row = torch.tensor(counts)[:, None] * whole
    mean = sum(counts) / len(counts)
    norm = float(per_row.square().sum(1).mean().sqrt()) / mean
    assert share.norm == pytest.approx(norm, rel=1e-5)
    every = expected_share(net, llama.batches(rows, 2), OptimizerStep(1, 0.0))
    assert every.norm > share.norm


def test_a_space_names_what_is_taken_and_tells_a_state_by_all_that_is_trained() -> None:
    net = model()
    spaces = {
        modules: GradientSpace.of(net, GradientSettings(gradient_modules=modules))  # type: ignore[arg-type]
        for modules in ("linear", "all")
    }

    def fields(modules: str) -> dict[str, Any]:
        return spaces[modules].fields(net, tokenizer=None, template="", stage="sft", rows={})

    before = {modules: fields(modules) for modules in spaces}
    assert before["linear"]["parameters"] != before["all"]["parameters"]
    assert before["linear"]["base_model"] == before["all"]["base_model"]
    state = {modules: spaces[modules].trained for modules in spaces}
    assert set(state["linear"]) == set(state["all"])
    with torch.no_grad():
        net.model.norm.weight[0] += 1  # trained, and left out of the gradient
    assert {modules: fields(modules) for modules in spaces} == before


def test_more_parameters_than_a_projection_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gradstore.export.gradient_space.MAX_P", 1000)
    with pytest.raises(BadInput, match=r"longer than a projection takes, 1,000: train a LoRA"):
        GradientSpace.of(model(), GradientSettings(gradient_modules="all"))


def test_factors_of_whole_weights_are_refused_by_name(llama: Any) -> None:
    with pytest.raises(BadInput, match="kfac factors are fitted of LoRA matrices"):
        fit_factors(model(), llama.batches(llama.rows(2), 2), "kfac")


# -- memory ---------------------------------------------------------------------------------------


def rows_as_batches(llama: Any, n: int, budget: int) -> Batches:
    rows = llama.rows(n)
    return Batches(rows, llama.collate, [len(row["input_ids"]) for row in rows], budget)


def peak_beside_the_model(work: Any) -> int:
    """Bytes by which the process grew at its peak while `work` ran."""
    status = Path("/proc/self/status")

    def kilobytes(key: str) -> int:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(key)]
        return int(line.split()[1])

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what is free already would be used again, unseen
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


@pytest.mark.parametrize("kind", ["sgd", "adam_marginal"])
def test_the_estimate_is_near_what_is_measured_and_far_below_whole_gradients(
    kind: Kind, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell a process's peak")
    monkeypatch.setattr(dense, "CPU_ELEMENTS", USUAL_ELEMENTS)
    net = model(hidden_size=512, intermediate_size=2048, vocab_size=8192)
    batches = rows_as_batches(llama, 64, 512)
    spec, space = FeatureSpec(kind, modules="linear"), GradientSpace.of(net, GradientSettings())
    projection = ProjectionSpec("sjlt", p=space.projection.p, d=4096)
    estimate = pass_memory(net, batches, spec, projection)
    assert estimate is not None

    def run() -> None:
        adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        moments = AdamMoments.from_optimizer(adam, net) if spec.needs_moments else None
        if moments is not None:  # zeros are no memory yet
            for each in moments.parameters.values():
                each.m.add_(1e-3)
                each.v.add_(1e-6)
        every = np.arange(64)
        pairs = [(every[i : i + 20], llama.collate([batches.dataset[j] for j in every[i : i + 20]]))
                 for i in (0, 20)]  # fmt: skip
        for _ in export_features(net, pairs, features=spec, projection=projection,
                                 moments=moments):  # fmt: skip
            pass

    run()  # what only the first call takes
    measured = peak_beside_the_model(run)
    whole_gradients = 4 * 20 * projection.p
    assert measured / 1.5 <= estimate.total <= measured * 1.5, (estimate, measured)
    if kind == "sgd":
        assert estimate.total < whole_gradients / 3


def test_the_estimate_follows_what_memory_depends_on(llama: Any) -> None:
    net, batches = model(), rows_as_batches(llama, 8, 100)

    def need(kind: Kind = "sgd", budget: int = 100, modules: Modules = "linear") -> PassMemory:
        some = rows_as_batches(llama, 8, budget)
        found = pass_memory(net, some, FeatureSpec(kind, modules=modules), projection)
        assert found is not None
        return found

    spec, everything = FeatureSpec("sgd"), sum(p.numel() for p in net.parameters())
    projection = ProjectionSpec("sjlt", p=everything, d=64)
    small, large = (
        pass_memory(net, batches, spec, projection, unit_rows=rows) for rows in (256, 4096)
    )
    assert small is not None
    assert large is not None
    assert large.sums - small.sums == 8 * (4096 - 256) * 64  # a unit's features, twice
    _, slots = gradients(net, batches.dataset[:1], "linear")
    p = sum(slot.numel for slot in slots)
    assert (need().vectors, need().moments) == (0, 0)
    assert (need("adam").vectors, need("adam").moments) == (8 * p, 8 * everything)
    assert need("adam_marginal").vectors == 12 * p
    assert need("adam_marginal", modules="all").vectors == 12 * everything
    assert need(budget=400).activations == pytest.approx(4 * need().activations, rel=0.01)
    assert need(budget=400).sums > need().sums
    assert pass_memory(llama.model(), batches, FeatureSpec("sgd"), projection) is None


@pytest.mark.parametrize(("device", "rows"), [("cpu", 64), ("cuda", 64), ("full", 0)])
def test_the_estimate_has_the_gradients_that_wait_for_a_dense_projection(
    llama: Any, device: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as an export gathers; where 64 have no room, whole weights' are never kept."""
    net, batches, spec = model(), rows_as_batches(llama, 8, 100), FeatureSpec("sgd")
    p = sum(parameter.numel() for parameter in net.parameters())
    room = 4 * (64 * 4 * p - (device == "full"))
    on, waits = projected.buffer_bytes_on, ProjectionSpec("rademacher", p=p, d=64)
    if device != "cpu":
        monkeypatch.setattr(projected, "free_on", lambda _device: room)
        for module in (memory, projected):
            monkeypatch.setattr(module, "buffer_bytes_on",
                                lambda _device, spec: on(torch.device("cuda"), spec))  # fmt: skip
    estimate = pass_memory(net, batches, spec, waits)
    assert estimate is not None
    assert estimate.waiting == 4 * p * rows
    sparse = pass_memory(net, batches, spec, ProjectionSpec("sjlt", p=p, d=64))
    assert sparse is not None
    assert sparse.waiting == 0
    assert estimate.on_device - sparse.on_device == estimate.waiting

    buffers: list[int] = []
    gathered = projected._Exporter.gathered

    def watched(self: Any, pairs: Any) -> Any:
        buffers.append(self.gather_rows)
        return gathered(self, pairs)

    monkeypatch.setattr(projected._Exporter, "gathered", watched)
    pairs = batches.of(UnitRange(0, 0, 8))
    assert list(export_features(net, pairs, features=spec, projection=waits))
    assert buffers == [rows] * (rows > 0)


def test_too_little_memory_is_refused_before_the_start(
    llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, batches, spec = model(), rows_as_batches(llama, 8, 100), FeatureSpec("sgd")
    projection = ProjectionSpec("sjlt", p=sum(x.numel() for x in net.parameters()), d=64)
    with caplog.at_level("INFO"):
        check_memory(net, batches, spec, projection)
    (line,) = [r.getMessage() for r in caplog.records if "whole weights" in r.getMessage()]
    assert "beside the model" in line
    assert "100 tokens" in line
    monkeypatch.setattr(memory, "free_ram", lambda: 1000)
    with pytest.raises(BadInput, match=r"are free.*Lower tokens_per_batch.*LoRA adapter"):
        check_memory(net, batches, spec, projection)
    check_memory(llama.model(), batches, spec, projection)  # an adapter's are small
    enough = pass_memory(net, batches, spec, projection)
    assert enough is not None
    monkeypatch.setattr(memory, "free_ram", lambda: 2 * enough.total)
    check_memory(net, batches, spec, projection)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="are free"):
        check_memory(net, batches, spec, projection)
    monkeypatch.setattr(memory, "free_ram", lambda: None)
    check_memory(net, batches, spec, projection)


def test_free_ram_is_the_least_of_the_machines_and_the_groups(tmp_path: Path) -> None:
    assert free_ram(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 90 kB\nMemAvailable:    50 kB\n")
    assert free_ram(tmp_path) == 50 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("9000\n")
    (group / "memory.max").write_text("max\n")
    assert free_ram(tmp_path) == 50 * 1024
    (group / "memory.max").write_text("10000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 300\nactive_file 20\n")
    assert free_ram(tmp_path) == 1320
