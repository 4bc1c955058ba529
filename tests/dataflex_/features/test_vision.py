"""Pictures and texts as a model is shown them; what a config says; what changes features."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dataflex.data.images import TextsWithPictures, opened, pictures_hash, shown_batch
from dataflex.data.rows import Rows
from dataflex.features.vision import Anatomy
from dataflex.selectors.coincide import CoincideSelector
from gradstore.capture.limits import max_positions
from gradstore.errors import BadInput
from gradstore.export.visual import VisualStates

VISION = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "vision"


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(VISION / "model")
    processor: Any = AutoProcessor.from_pretrained(VISION / "model")
    return model, processor


def rows_of(processor: Any, images: list[Any]) -> Rows:
    from datasets import Dataset

    texts = ["What colour is the square?", "Where is it? It is lower left, below the other ones."]
    ids = [processor.tokenizer(f"<image><image>{t}")["input_ids"] for t in texts]
    return Rows("train", Dataset.from_list(
        [{"input_ids": i, "labels": i, "images": p} for i, p in zip(ids, images, strict=True)]
    ))  # fmt: skip


def test_another_model_sees_the_pictures_first_then_the_text(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    files = [str(VISION / "data" / "pictures" / f"{i:02d}.png") for i in range(3)]
    rows = rows_of(processor, [files[:2], files[2:]])
    image = model.config.image_token_id
    shown = TextsWithPictures(rows, processor.tokenizer, [image])
    assert shown[0][0] == "What colour is the square?"
    (mark,) = processor.tokenizer("?")["input_ids"]
    assert (
        TextsWithPictures(rows, processor.tokenizer, [image, mark])[0][0]
        == "What colour is the square"
    )
    states = VisualStates(model, [0, 2], [image])
    batch = shown_batch(processor, [shown[0], shown[1]])
    assert (batch["input_ids"] == image).sum(1).tolist() == [32, 16]
    together = states(batch)
    for i, pictures in enumerate((files[:2], files[2:])):
        alone = processor(text=["<image>" * len(pictures) + f"\n{shown[i][0]}"],
                          images=[opened(p) for p in pictures], return_tensors="pt")  # fmt: skip
        assert torch.allclose(states(dict(alone))[0], together[i], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_a_chat_template_is_used_where_there_is_one(llava: tuple[Any, Any]) -> None:
    _, processor = llava
    template = (
        "{% for m in messages %}USER {% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}"
    )
    processor.chat_template = template
    try:
        picture = opened(torch_picture())
        batch = shown_batch(processor, [("Why?", [picture])])
    finally:
        processor.chat_template = None
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("USER <image>")
    assert text.endswith("Why?")


def torch_picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (28, 28), (200, 30, 30))


def test_pictures_may_be_paths_bytes_or_both(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch_picture().save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    for picture in (str(path), buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None},
                    {"bytes": None, "path": str(path)}, torch_picture()):  # fmt: skip
        assert opened(picture).getpixel((5, 5)) == (200, 30, 30)
    (tmp_path / "b.png").write_text("no picture")
    for broken in (str(tmp_path / "b.png"), str(tmp_path / "none.png"), {"bytes": None}):
        with pytest.raises(BadInput, match="cannot be read"):
            opened(broken)


def test_features_are_others_where_a_picture_is(llava: tuple[Any, Any], tmp_path: Path) -> None:
    _, processor = llava
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"12345")
    second.write_bytes(b"123456")

    def hashed(*images: list[str]) -> str:
        return pictures_hash(rows_of(processor, list(images)))

    held = hashed([str(first)], [str(second)])
    assert held == hashed([str(first)], [str(second)])
    assert held != hashed([str(second)], [str(first)])
    assert held != hashed([str(first), str(second)], [])
    first.write_bytes(b"1234567")
    assert held != hashed([str(first)], [str(second)])


def test_a_config_says_layers_and_tokens(llava: tuple[Any, Any]) -> None:
    config = llava[0].config
    anatomy = Anatomy.of(config, None, "the model")
    assert (anatomy.layers, anatomy.dim, max_positions(llava[0])) == ((0, 1, 2), 2 * 3 * 64, 256)
    with pytest.raises(BadInput, match=r"embedding_layers is \[1, 4\], but the model has layers"):
        Anatomy.of(config, (1, 4), "the model")
    with pytest.raises(BadInput, match=r"\(llama\) has no image tokens"):
        Anatomy.of(SimpleNamespace(model_type="llama"), None, "the model")


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"embedding_layers": ()}, "embedding_layers is"),
     ({"embedding_layers": (1, 1)}, "embedding_layers is"),
     ({"embedding_layers": (-1,)}, "embedding_layers is"),
     ({"embedding_model_dtype": "int8"}, "embedding_model_dtype is")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CoincideSelector(**changes)
