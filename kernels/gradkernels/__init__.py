"""Random projections of gradients: one matrix per `ProjectionSpec`, on every device the same.

    >>> import torch
    >>> from gradkernels import ProjectionSpec, project
    >>> spec = ProjectionSpec("sjlt", p=1000, d=64, seed=7)
    >>> project(torch.ones(2, 1000), spec).shape
    torch.Size([2, 64])

Letters used in every docstring: b rows of a batch, p gradient length, d projected dimensions,
s non-zeros per parameter (SJLT), j a parameter's global index, i an output's index.
"""

from __future__ import annotations

from gradkernels.dispatch import Accumulator, project
from gradkernels.features import Feature
from gradkernels.reference import canary, project_reference
from gradkernels.spec import ProjectionSpec

__all__ = ["Accumulator", "Feature", "ProjectionSpec", "canary", "project", "project_reference"]
