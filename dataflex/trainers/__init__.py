"""Trainers: LlamaFactory's, with the data decided at exact optimizer steps."""
