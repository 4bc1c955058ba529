"""Make the tiny mixture of experts with random weights that `dynamic_moe.yaml` runs on.

    python examples/tiny/make_moe.py [FOLDER]

A Qwen2-MoE of two layers with eight experts each, two of which see every token, and the tokenizer
of `examples/tiny/model`. The folder is `examples/tiny/moe` unless another is named; what is
committed there is what this script makes. On disk the weights are float16; `config.json` says
float32, so they are loaded as such.
"""

from __future__ import annotations

import json
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
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in (HERE / "model").glob("tokenizer*"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
