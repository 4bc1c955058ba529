"""What an import costs and drags in: the layers hold at run time too."""

from __future__ import annotations

import subprocess
import sys

import pytest

FOREIGN = {"transformers", "peft", "llamafactory", "datasets", "accelerate"}
HEAVY = {"zarr", "faiss", "pyarrow", "numba", "trak", "obstore"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import gradkernels", FOREIGN | HEAVY | {"gradstore", "dataflex"}),
        ("import gradstore", FOREIGN | HEAVY | {"dataflex", "torch"}),
        ("import gradstore; gradstore.influence_scores", FOREIGN | HEAVY | {"dataflex"}),
        ("import gradstore; gradstore.GradientCapture, gradstore.export_features",
         FOREIGN | {"dataflex", "faiss", "pyarrow", "trak"}),
        ("from gradstore.storage.places import files_at, lock_of; lock_of(files_at('a'))",
         FOREIGN | HEAVY | {"dataflex", "torch"}),
        ("import dataflex; import dataflex.launch.asked", FOREIGN | HEAVY | {"torch"}),
        ("import dataflex; dataflex.read_configuration", FOREIGN | HEAVY | {"torch"}),
        ("import dataflex.cli", FOREIGN | HEAVY | {"torch"}),
    ],
)  # fmt: skip
def test_an_import_brings_nothing_it_need_not(statement: str, without: set[str]) -> None:
    assert not modules_after(statement) & without


def test_every_public_name_of_the_package_is_there() -> None:
    code = (
        "import dataflex; print(dataflex.read_configuration.__module__, "
        "all(getattr(dataflex, name) is not None for name in dataflex.__all__), "
        "hasattr(dataflex, 'read'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    module, there, unlisted = done.stdout.split()
    assert (module, there, unlisted) == ("dataflex.launch.configuration", "True", "False")


def test_the_kernels_folder_is_not_taken_for_another_package() -> None:
    """A transformers that found a `kernels` package would ask it for its version."""
    code = (
        "from transformers.utils import is_kernels_available; import importlib.util as u; "
        "print(is_kernels_available(), u.find_spec('gradkernels') is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
