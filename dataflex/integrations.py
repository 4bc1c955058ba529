"""For training without LlamaFactory: features of transformers' Trainer and TRL's SFTTrainer."""

from dataflex.launch.plain_trainer import GradientStoreCallback

__all__ = ["GradientStoreCallback"]
