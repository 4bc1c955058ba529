"""Shared by every test: no hub, no telemetry, one thread, quiet progress bars."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

# A test says whether numbers are right; how long that takes is for benchmarks.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
