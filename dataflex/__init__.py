"""Trains an LLM while its data changes: select, mix, weight, on top of LlamaFactory."""

__version__ = "0.1.0"
