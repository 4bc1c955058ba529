"""Rows that are hard to tell apart: images, tokens in the first place, positions of three kinds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.rows import check_apart, one_more_row, row_axis, row_of
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput

VOCABULARY, IMAGE, PATCHES = 41, 40, 4
Batch = dict[str, Tensor]


def taken(capture: GradientCapture, batch: Batch) -> Tensor:
    """Gradients (b, p), each place once."""
    out = torch.full((len(batch["labels"]), capture.p), torch.nan)

    def sink(slot: ParameterSlot, block: Tensor) -> None:
        span = out[:, slot.start : slot.start + slot.numel]
        assert bool(span.isnan().all())
        assert block.shape == span.shape
        span.copy_(block)

    stats = capture.capture(batch, sink)
    assert stats.loss.shape == stats.target_tokens.shape == (len(out),)
    assert not bool(out.isnan().any())
    return out


def captured(model: nn.Module, batch: Batch) -> Tensor:
    with GradientCapture(model) as capture:
        return taken(capture, batch)


def alone(model: Any, rows: Sequence[Batch]) -> Tensor:
    """Plain autograd, one row at a time: (b, p)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    found = []
    for row in rows:
        output = model(**{key: value for key, value in row.items() if key != "labels"})
        logits = getattr(output, "logits", output)
        loss = F.cross_entropy(logits[0, :-1].float(), row["labels"][0, 1:])
        pieces = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(pieces, parameters, strict=True)
        found.append(torch.cat([(p * 0 if g is None else g).reshape(-1) for g, p in pairs]))
    return torch.stack(found).detach()


def same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm(dim=1).min() > 0
    assert ((found - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


# ---- images ----------------------------------------------------------------------------------


def llava(*trained: str) -> Any:
    """LoRA on the modules whose names end so, in a model that sees images of four patches."""
    torch.manual_seed(0)
    sees = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    says = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=sees,
        text_config=says,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        attn_implementation="eager",  # of which torch can vectorise every operation
    )
    base = LlavaForConditionalGeneration(config)
    lora = LoraConfig(r=2, target_modules=rf".*({'|'.join(trained)}).*", init_lora_weights=False)
    return get_peft_model(base, lora)


def looking(images: Sequence[int]) -> tuple[Batch, list[Batch]]:
    """Rows with so many images each: in a batch, and each by itself."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for row, count in enumerate(images):
        text = torch.randint(3, IMAGE, (12 + row,), generator=generator)
        ids = torch.cat([torch.tensor([IMAGE] * PATCHES * count, dtype=torch.long), text])
        labels = torch.where(ids == IMAGE, -100, ids)
        pixels = torch.randn(count, 3, 8, 8, generator=generator)
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> Tensor:
        return torch.stack([F.pad(row[key], (0, width - len(row[key])), value=filler)
                            for row in rows])  # fmt: skip

    ids = padded("input_ids", 0)
    batch = {"input_ids": ids, "labels": padded("labels", -100),
             "attention_mask": (ids != 0).long(),
             "pixel_values": torch.cat([row["pixel_values"] for row in rows])}  # fmt: skip
    singles = [
        {key: value if key == "pixel_values" else value[None] for key, value in row.items()}
        for row in rows
    ]
    for single, count in zip(singles, images, strict=True):
        if not count:
            del single["pixel_values"]
    return batch, singles


LANGUAGE, TOWER = (r"language_model.*q_proj",), (r"vision_tower.*q_proj", "linear_1", "lm_head")


@pytest.mark.parametrize("images", [(1, 1), (2, 1), (2, 0), (1, 3, 2)])
def test_a_language_model_beside_a_frozen_tower_has_its_rows_gradients_whatever_images_they_have(
    images: Sequence[int],
) -> None:
    model, (batch, singles) = llava(*LANGUAGE), looking(images)
    expected = alone(model, singles)
    same(captured(model, batch), expected)


def test_a_trained_tower_has_its_rows_gradients_where_each_row_has_one_image() -> None:
    model, (batch, singles) = llava(*LANGUAGE, *TOWER), looking((1, 1, 1))
    expected = alone(model, singles)
    same(captured(model, batch), expected)


@pytest.mark.parametrize("images", [(2, 1), (1, 3, 2), (1, 0)])
def test_a_trained_tower_is_refused_by_name_where_images_are_not_as_many_as_rows(
    images: Sequence[int],
) -> None:
    batch, singles = looking(images)
    count = sum(images)
    with pytest.raises(BadInput, match=rf"pixel_values \({count}, 3, 8, 8\).*tokens_per_batch: 1"):
        captured(llava(*TOWER), batch)
    row = next(each for each in singles if "pixel_values" in each)
    model = llava(*LANGUAGE, *TOWER)
    same(captured(model, row), alone(model, [row]))  # as the message says


def test_as_many_images_as_rows_but_not_one_a_row_give_no_numbers() -> None:
    """The first row's images were credited to both rows."""
    batch, _ = looking((2, 0))
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        captured(llava(*TOWER), batch)


# ---- tokens first ----------------------------------------------------------------------------


class Flipped(nn.Module):
    """A causal model whose layer sees tokens first, (t, b, h)."""

    def __init__(self, *, lora: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        if lora:
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 8)})
        else:
            self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)
        if lora:
            self.embedding.requires_grad_(False)
            self.head.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        flat = hidden.transpose(0, 1)
        if hasattr(self, "layer"):
            change = self.layer(flat)
        else:
            change = self.lora_B["default"](self.lora_A["default"](flat))
        return self.head(hidden + change.transpose(0, 1))


def plain(rows: int, tokens: int) -> tuple[Batch, list[Batch]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    return batch, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(rows)]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (5, 6), (6, 5)])
def test_a_layer_that_sees_tokens_first_credits_them_to_their_rows(
    lora: bool, shape: tuple[int, int]
) -> None:
    """Of a square batch the shape alone would not tell."""
    model = Flipped(lora=lora)
    batch, singles = plain(*shape)
    expected = alone(model, singles)
    before = {key: value.clone() for key, value in batch.items()}
    same(captured(model, batch), expected)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_a_square_batch_shows_as_many_rows_as_it_has() -> None:
    model = Flipped(lora=True)
    batch, _ = plain(5, 5)
    seen: set[tuple[int, ...]] = set()

    class Straight(Flipped):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            hidden = self.embedding(input_ids)
            return self.head(hidden + self.lora_B["default"](self.lora_A["default"](hidden)))

    model = Straight(lora=True)
    with GradientCapture(model) as capture:
        stats = capture.capture(
            batch,
            lambda slot, block: seen.add(block.shape[:1]),
            lambda slot, x, gradient: seen.update([x.shape[:2], gradient.shape[:2]]),
        )
    assert seen == {(5,), (5, 5)}
    assert len(stats.loss) == len(stats.target_tokens) == 5
    assert stats.target_tokens.tolist() == [4] * 5


# ---- other inputs ----------------------------------------------------------------------------


class Positioned(nn.Module):
    """Its positions are of three kinds, (3, b, t); its gain is no layer's."""

    def __init__(self, *, traced: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(VOCABULARY, 8).requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(3, 8))
        self.head = nn.Linear(8, VOCABULARY).requires_grad_(False)
        self._traced = traced

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        assert position_ids.shape == (3, *input_ids.shape)
        if not self._traced and bool((position_ids < 0).any()):  # a branch on data
            raise AssertionError
        waves = (position_ids[..., None] * self.gain[:, None, None]).sin().sum(0)
        return self.head(self.embedding(input_ids) + waves)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("rows", [2, 3])
def test_positions_of_three_kinds_go_with_their_rows(rows: int, traced: bool) -> None:
    model = Positioned(traced=traced)
    batch, singles = plain(rows, 7)
    del batch["attention_mask"]
    positions = torch.arange(3 * rows * 7).reshape(3, rows, 7)
    singles = [
        {
            "input_ids": s["input_ids"],
            "labels": s["labels"],
            "position_ids": positions[:, i : i + 1],
        }
        for i, s in enumerate(singles)
    ]
    expected = alone(model, singles)
    with GradientCapture(model) as capture:
        same(taken(capture, {**batch, "position_ids": positions}), expected)
        assert capture._rowwise._vmap_works == traced


@pytest.mark.parametrize(
    ("key", "shape", "axis"),
    [("input_ids", (4, 9), 0), ("attention_mask", (4, 1, 9, 9), 0), ("position_ids", (3, 4, 9), 1),
     ("position_ids", (4, 9), 0), ("position_ids", (1, 9), None), ("pixel_values", (5, 7), None),
     ("count", (), None)],
)  # fmt: skip
def test_rows_lie_where_a_batch_has_them(
    key: str, shape: tuple[int, ...], axis: int | None
) -> None:
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert row_axis(key, value, (4, 9)) == axis
    (own,) = row_of({key: value}, 2, (4, 9)).values()
    assert torch.equal(own, value if axis is None else value.narrow(axis, 2, 1))


def test_three_rows_with_positions_of_three_kinds_have_rows_second() -> None:
    assert row_axis("position_ids", torch.zeros(3, 3, 9), (3, 9)) == 1


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"pixel_values": torch.zeros(6, 8)}, r"pixel_values \(6, 8\)"),
        ({"pixel_values": [torch.zeros(1)]}, "pixel_values, a list of 1"),
        ({"cu_seqlens": torch.zeros(5)}, r"cu_seqlens \(5,\)"),
        ({"position_ids": torch.zeros(1, 9), "cache_position": torch.zeros(9),
          "mask": torch.zeros(1, 1, 9, 9), "scale": torch.tensor(2.0), "pixel_values": None,
          "num_items_in_batch": torch.zeros(7)}, None),
    ],
)  # fmt: skip
def test_inputs_of_something_else_than_rows_are_named(inputs: Any, told: str | None) -> None:
    batch, _ = plain(4, 9)
    check_apart({**batch, **inputs}, (1, 9))  # of one row nothing is asked
    if told is None:
        check_apart({**batch, **inputs}, (4, 9))
    else:
        with pytest.raises(BadInput, match=told):
            check_apart({**batch, **inputs}, (4, 9))


def test_a_batch_with_images_gets_no_further_row() -> None:
    batch, _ = plain(4, 4)
    more = one_more_row(batch, (4, 4))
    assert more["input_ids"].shape == (5, 4)
    assert bool((more["labels"][4] == -100).all())
    pictured = {**batch, "pixel_values": torch.zeros(6, 8)}
    assert one_more_row(pictured, (4, 4)) is pictured


# ---- layers that take part now and then ------------------------------------------------------


class Rarely(nn.Module):
    """A second adapter that is called where a batch holds a token of the upper half."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(VOCABULARY, 8).requires_grad_(False)
        for name in ("always", "rarely"):
            part = nn.Module()
            part.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})
            part.lora_B = nn.ModuleDict({"default": nn.Linear(4, 8, bias=False)})
            self.add_module(name, part)
        self.head = nn.Linear(8, VOCABULARY).requires_grad_(False)
        self.forwards = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.forwards += 1
        hidden = self.embedding(input_ids)
        hidden = hidden + self.change("always", hidden)
        chosen = input_ids >= VOCABULARY // 2
        if bool(chosen.any()):
            hidden = hidden + self.change("rarely", hidden) * chosen[..., None]
        return self.head(hidden)

    def change(self, name: str, hidden: Tensor) -> Tensor:
        part: Any = getattr(self, name)
        return part.lora_B["default"](part.lora_A["default"](hidden))


def test_an_adapter_that_takes_no_part_in_a_batch_has_zeros_and_costs_no_further_pass(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Rarely()
    with_it, singles = plain(3, 8)
    without = {**with_it, "input_ids": with_it["input_ids"] % (VOCABULARY // 2)}
    lower = [{**s, "input_ids": s["input_ids"] % (VOCABULARY // 2)} for s in singles]
    expected = {True: alone(model, singles), False: alone(model, lower)}
    with caplog.at_level(logging.INFO, "gradstore"), GradientCapture(model) as capture:
        costs = []
        for called in (False, False, True, False, True):
            model.forwards = 0
            same(taken(capture, with_it if called else without), expected[called])
            costs.append(model.forwards)
    assert min(costs[:2]) > 1, "nobody knows yet that the adapter's calls are all there is"
    assert costs[2:] == [1, 1, 1]
    assert sum("further pass" in line for line in caplog.messages) == 1
