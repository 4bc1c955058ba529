"""sentence-transformers, which runs the folders in its own format: the one importer of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from gradstore.errors import BadInput
from gradstore.export.pooling import Pooling, pool

if TYPE_CHECKING:
    import torch

    from gradstore.export.units import Batch

#: The package, and its oldest version that can be asked for any of a model's hidden states.
LIBRARY, OLDEST = "sentence-transformers", "6.0"


def check_library(folder: Path) -> None:
    """Refuse a sentence-transformers folder where that library is missing or too old.

    Raises:
        BadInput: names the command that installs it.
    """
    try:
        installed = importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        found = "it is not installed"
    else:
        if Version(installed) >= Version(OLDEST):
            return
        found = f"{installed} is installed"
    raise BadInput(
        f"the embedding model in {str(folder)!r} needs {LIBRARY} {OLDEST} or newer, but {found}: "
        "pip install 'dataflex-gradstore[encoders]'"
    )


def load_by_library(
    folder: Path,
    *,
    dtype: str,
    layer: int,
    pooling: Pooling,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[Any, Callable[[Batch], torch.Tensor]]:
    """Load tokenizer and model of a folder, without a look at the hub.

    The forward is the library's, the pooling ours: the library's differs between its versions, and
    a stored embedding must not (docs/adr/0008-libraries.md).

    Args:
        folder: where the transformer lies.
        dtype: of the weights, as transformers names it.
        layer: index into the hidden states.
        pooling: how a row's tokens become one vector.
        device: where it runs.
        trust_remote_code: run the code that the folder brings.

    Returns:
        The tokenizer, and a function: batch (b, t) -> (b, d) float32 unit rows.

    Raises:
        ImportError, OSError, ValueError: it cannot be loaded.
    """
    import torch
    from sentence_transformers.sentence_transformer.modules import Transformer

    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    # Said in full: vectors shall depend on nothing that the encoder's hash does not cover.
    transformer = Transformer(
        str(folder),
        model_kwargs={**local, "dtype": dtype},
        processor_kwargs=dict(local),
        config_kwargs=dict(local),
        modality_config={
            "text": {"method": "forward", "method_output_name": ("hidden_states", layer)}
        },
        module_output_name="token_embeddings",
        unpad_inputs=False,
    )
    if transformer.tokenizer is None:
        raise ValueError("it has no tokenizer")
    transformer.to(device).eval()

    def states(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            found = transformer({key: value.to(device) for key, value in batch.items()})
        return pool(found["token_embeddings"], found["attention_mask"], pooling)

    return transformer.tokenizer, states
