"""The bridge to LlamaFactory: the only room that imports it."""
