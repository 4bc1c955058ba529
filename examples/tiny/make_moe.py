"""Makes a tiny mixture of experts with random weights, to run `dynamic_moe` on.

    python examples/tiny/make_moe.py [FOLDER]

A Qwen2-MoE of two layers with eight experts each, two of which see every token, and the tokenizer
of `examples/tiny/model`. The folder is `examples/tiny/moe` unless another is named.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(folder: Path = HERE / "moe") -> None:
    """Write model and tokenizer."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    state = torch.get_rng_state()
    torch.manual_seed(4)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    for path in (HERE / "model").glob("tokenizer*"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
