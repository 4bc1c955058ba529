"""LlamaFactory's keys that DataFlex reads, typed, with LlamaFactory's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import doc
from pydantic import BeforeValidator

from dataflex.config.parameters import converted
from dataflex.config.values import Whole, as_text, names

#: LlamaFactory accepts any truthy value for a switch, and converts a single value to text.
Switch = Annotated[bool, BeforeValidator(bool)]
Word = Annotated[str, BeforeValidator(as_text)]
Names = Annotated[tuple[str, ...], BeforeValidator(names), doc("a name, or a list of them")]


@dataclass(frozen=True)
class KnownKeys:
    """Values of the LlamaFactory keys that DataFlex reads, by field.

    `None` and `()` mean "not given". A value of a wrong type counts as not given here: it is among
    `faults`, which are told before anything depends on it.
    """

    # the run
    stage: Word = "sft"
    do_train: Switch = False
    overwrite_output_dir: Switch = False
    resume_from_checkpoint: Word | None = None
    per_device_train_batch_size: Whole = 8
    auto_find_batch_size: Switch = False
    gradient_accumulation_steps: Whole = 1
    max_steps: Whole = -1
    bf16: Switch = False
    fp16: Switch = False
    pure_bf16: Switch = False
    neftune_noise_alpha: float | None = None
    loraplus_lr_ratio: float | None = None
    num_train_epochs: float | None = None
    optim: Word = "adamw_torch_fused"
    use_galore: Switch = False
    use_apollo: Switch = False
    use_badam: Switch = False
    use_adam_mini: Switch = False
    use_muon: Switch = False
    early_stopping_steps: Whole | None = None
    predict_with_generate: Switch = False
    report_to: Any = "none"
    load_best_model_at_end: Switch = False
    metric_for_best_model: Word | None = None
    deepspeed: Any = None
    fsdp: Any = None
    use_mca: Switch = False
    use_hyper_parallel: Switch = False
    # the model
    model_name_or_path: Word | None = None
    trust_remote_code: Switch = False
    finetuning_type: Word = "lora"
    adapter_name_or_path: Names = ()
    create_new_adapter: Switch = False
    lora_dropout: float = 0.0
    use_unsloth: Switch = False
    enable_liger_kernel: Switch = False
    quantization_bit: Whole | None = None
    quantization_method: Word = "bnb"
    flash_attn: Word = "auto"
    use_dft_loss: Switch = False
    use_asft_loss: Switch = False
    use_eaft_loss: Switch = False
    label_smoothing_factor: float = 0.0
    moe_aux_loss_coef: float | None = None
    # the data
    dataset: Names = ()
    eval_dataset: Names = ()
    dataset_dir: Any = "data"
    tokenized_path: Word | None = None
    mix_strategy: Word = "concat"
    val_size: int | float = 0.0
    streaming: Switch = False
    packing: Switch | None = None
    neat_packing: Switch = False
    train_on_prompt: Switch = False
    ignore_pad_token_for_loss: Switch = True

    @staticmethod
    def of(keys: Mapping[str, Any]) -> KnownKeys:
        """Read a configuration's keys; a null means the default."""
        values, _ = converted(KnownKeys, keys)
        return KnownKeys(**values)

    @staticmethod
    def faults(keys: Mapping[str, Any]) -> dict[str, str]:
        """Return one sentence per value of a wrong type, by key."""
        return converted(KnownKeys, keys)[1]

    @property
    def packs(self) -> bool:
        """Packing of several rows into one sequence; the default of stage pt."""
        return self.stage == "pt" if self.packing is None else self.packing
