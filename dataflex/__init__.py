"""LLM training on changing data: selection, mixing and weighting, on top of LlamaFactory."""

__version__ = "0.2.0"
