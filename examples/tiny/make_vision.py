"""Make the tiny vision-language model and its pictures: what `coincide.yaml` runs on.

    python examples/tiny/make_vision.py [FOLDER]

A LLaVA whose language part is examples/tiny/model and whose eyes, two random layers, have seen
nothing: good for trying out, not for answers. Beside it 72 pictures of a coloured square with a
question each. Everything follows from a fixed seed; it takes seconds and 6 MB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent

#: Pixels of a picture and of a patch: (28 / 7)² = 16 image tokens.
SIDE, PATCH = 28, 7
IMAGE_TOKEN = "<image>"

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220),
           "yellow": (240, 220, 40), "black": (15, 15, 15), "white": (245, 245, 245)}  # fmt: skip
PLACES = {"upper left": (0, 0), "upper right": (0, 1), "lower left": (1, 0), "lower right": (1, 1)}
QUESTIONS = ("What colour is the square?", "Where is the square?", "Describe the picture.")


def make_model(folder: Path) -> None:
    """Write a LLaVA model, its tokenizer and its image processor."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language = AutoModelForCausalLM.from_pretrained(HERE / "model")
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
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.lm_head.load_state_dict(language.lm_head.state_dict())
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
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
