"""Inert guard: the code lives in `gradkernels`; see docs/adr on why this folder has a version."""

__version__ = "0.0.0"
