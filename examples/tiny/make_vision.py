"""Make the tiny vision-language model and its pictures: what `coincide.yaml` runs on.

    python examples/tiny/make_vision.py [FOLDER]

A LLaVA of random weights, four narrow layers to read and two to see: its states tell pictures and
questions apart, and that is all it is for. Its tokenizer is that of examples/tiny/model. Beside it
72 pictures of a coloured square with a question each. The folder is `examples/tiny/vision` unless
another is named; what is committed there is what this script makes, from a fixed seed in seconds.
On disk the weights are float16; `config.json` says float32, so they are loaded as such.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent

#: Pixels of a picture and of a patch: (28 / 7)² = 16 image tokens.
SIDE, PATCH = 28, 7
#: Of the language model's states.
WIDTH = 64
IMAGE_TOKEN = "<image>"

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220),
           "yellow": (240, 220, 40), "black": (15, 15, 15), "white": (245, 245, 245)}  # fmt: skip
PLACES = {"upper left": (0, 0), "upper right": (0, 1), "lower left": (1, 0), "lower right": (1, 1)}
QUESTIONS = ("What colour is the square?", "Where is the square?", "Describe the picture.")


def make_model(folder: Path) -> None:
    """Write a LLaVA model, its tokenizer and its image processor."""
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.half().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for part in (written, written["text_config"], written["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Write the pictures, `vision.json` and LlamaFactory's `dataset_info.json`."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    rows = []
    for colour, rgb in COLOURS.items():
        for place, (down, right) in PLACES.items():
            for question in QUESTIONS:
                pixels = generator.integers(90, 140, size=(SIDE, SIDE, 3), dtype=np.uint8)
                top, left = down * SIDE // 2, right * SIDE // 2
                pixels[top : top + SIDE // 2, left : left + SIDE // 2] = rgb
                name = f"pictures/{len(rows):02d}.png"
                Image.fromarray(pixels).save(folder / name)
                answer = {
                    QUESTIONS[0]: f"It is {colour}.",
                    QUESTIONS[1]: f"It is {place}.",
                    QUESTIONS[2]: f"A {colour} square, {place}.",
                }[question]
                rows.append(
                    {
                        "messages": [
                            {"role": "user", "content": f"{IMAGE_TOKEN}{question}"},
                            {"role": "assistant", "content": answer},
                        ],
                        "images": [name],
                    }
                )
    order = generator.permutation(len(rows))
    lines = ",\n".join(json.dumps(rows[i]) for i in order)
    (folder / "vision.json").write_text(f"[\n{lines}\n]\n")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant"}  # fmt: skip
    info = {
        "tiny_vision": {
            "file_name": "vision.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": tags,
        }
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


def main(folder: Path = HERE / "vision") -> None:
    """Make both, below `folder`."""
    make_model(folder / "model")
    make_data(folder / "data")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
