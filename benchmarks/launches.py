"""Kernels that an export launches for a batch, beyond a plain forward and backward.

    uv run python benchmarks/launches.py            # no GPU needed, a minute

A model of SmolLM2-135M's shape with LoRA r=16 on all linear layers, random weights, on the way that
a CUDA device takes. Counted are the operations that PyTorch dispatches, but for views and empty
tensors, and the launches of our Triton kernels, which are not run. *Plain* are those of a trainer's
forward and backward of the same batch, with the model's own loss. How long the rows are and how
many changes no count, but for groups of 64 rows.

A *wait* is an operation that has to know a number of the device before the host goes on (`nonzero`,
a choice by a mask, `item`); a *copy* brings results to the host (`Tensor.cpu`), for which that
waits, too. Prints a line for each projection and appends them to results/launches.csv. Exits 1
where there are more launches than two for each LoRA matrix, `LIMIT`; before the kernels made
features and blocks were joined they were many more (docs/adr/0023-runs.md).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gradkernels import ProjectionSpec, dispatch
from report import RESULTS, append, echo, machine
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from gradstore.export import projected
from gradstore.export.features import FeatureSpec
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments

ROWS, TOKENS, DIM, LAYERS, VOCABULARY = 8, 16, 4096, 30, 49152
#: Launches of an export beyond a plain pass's, at most, for each LoRA matrix.
LIMIT = 2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: Operations that launch nothing, and that wait for the device.
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}


class Counting(TorchDispatchMode):
    """Counts operations by name.

    Attributes:
        launched: of each name.
        waits: for numbers of the device, by name.
        copies: of tensors to the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(
        self,
        operation: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Count an operation and run it."""
        name = operation.overloadpacket.__name__
        returned = [each.alias_info for each in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if name in WAITS or (name == "index" and _by_mask(args[1])):
            self.waits[name] += 1
        elif not is_view and name not in NOTHING:
            self.launched[name] += 1
        return operation(*args, **(kwargs or {}))


def _by_mask(indices: object) -> bool:
    """Return whether a tensor is indexed by a mask: how many it has, the device alone knows."""
    assert isinstance(indices, Sequence)
    return any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in indices)


@contextmanager
def as_on_a_gpu(counting: Counting) -> Iterator[None]:
    """Take the way of a CUDA device on the CPU; launches of Triton's kernels are counted alone."""
    from triton.runtime.jit import JITFunction

    def to_the_host(x: torch.Tensor) -> torch.Tensor:
        counting.copies += 1
        return x

    def launched(kernel: JITFunction[..., object], _grid: object) -> Callable[..., None]:
        def count(*_: object, **__: object) -> None:
            counting.launched[f"triton {kernel.fn.__name__}"] += 1

        return count

    with (
        patch.object(projected, "FUSED", ("cpu",)),
        patch.object(dispatch, "choose_backend", lambda *_: "triton"),
        patch.object(dispatch, "refusal", lambda *_: None),
        patch.object(JITFunction, "__getitem__", launched),
        patch.object(torch.Tensor, "is_cuda", True),
        patch.object(torch.Tensor, "cpu", to_the_host),
    ):
        yield


def lora_model(layers: int = LAYERS) -> torch.nn.Module:
    """Make a model of SmolLM2-135M's shape, or of fewer layers, with adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    adapter = LoraConfig(r=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    base = LlamaForCausalLM(shape)  # type: ignore[no-untyped-call]
    model: torch.nn.Module = get_peft_model(base, adapter)
    return model.eval()


def moments_of(model: torch.nn.Module) -> AdamMoments:
    """Make moments of every trained parameter."""
    return AdamMoments({
        name: ParameterMoments(torch.zeros_like(p), torch.ones_like(p),
                               AdamConstants(0.9, 0.999, 1e-8, 10))
        for name, p in model.named_parameters()
        if p.requires_grad
    })  # fmt: skip


def batches(groups: int) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """Make batches of rows of random tokens."""
    import numpy as np

    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    return [(np.arange(ROWS) + ROWS * group, batch) for group in range(groups)]


def of_the_model(model: torch.nn.Module) -> Counting:
    """Count a forward and backward as a trainer makes them."""
    counting, batch = Counting(), batches(1)[0][1]

    def one_pass() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    with as_on_a_gpu(counting):
        one_pass()  # what is done once
        counting.copies = 0
        with counting:
            one_pass()
    return counting


def of_the_export(model: torch.nn.Module, method: str, groups: int) -> Counting:
    """Count an export of so many batches."""
    counting = Counting()
    spec: Any = {"method": method, "p": numbers(model)[0], "d": DIM, "seed": 1}
    parts = projected.export_features(
        model, batches(groups), features=FeatureSpec("adam_marginal"),
        projection=ProjectionSpec(**spec), moments=moments_of(model),
    )  # fmt: skip
    with as_on_a_gpu(counting), counting:
        for _ in parts:
            pass
    return counting


def numbers(model: torch.nn.Module) -> tuple[int, int]:
    """Count what is trained: parameters, and matrices."""
    trained = [x.numel() for x in model.parameters() if x.requires_grad]
    return sum(trained), len(trained)


def measure(layers: int = LAYERS) -> list[dict[str, Any]]:
    """Count both projections' launches: one line each."""
    model = lora_model(layers)
    own, (p, matrices) = of_the_model(model), numbers(model)
    lines = []
    for method in ("sjlt", "rademacher"):
        # What an export does once, such as making Adam's vectors, is in the first batches alone:
        # sixteen batches are two groups of 64 rows, eight are one.
        some, more = (of_the_export(model, method, groups) for groups in (8, 16))
        extra = more.launched - some.launched
        each = extra.total() / 8 - own.launched.total()
        waits, copies = more.waits - some.waits, (more.copies - some.copies) / 8
        beyond = {name: count / 8 - own.launched[name] for name, count in extra.items()}
        top = sorted(beyond.items(), key=lambda item: -item[1])
        echo(f"{method}: {each:g} launches a batch beyond a plain pass's {own.launched.total()}, "
             f"waits {dict(waits)} of 8 beside its {dict(own.waits)} of one, "
             f"copies {copies:g} beside its {own.copies}; "
             + ", ".join(f"{name} {count:g}" for name, count in top if count))  # fmt: skip
        lines.append({"projection": method, "d": DIM, "p": p, "rows": ROWS, "beside": "trainer",
                      "model": own.launched.total(), "launches": each,
                      "waits": waits.total() / 8, "model_waits": own.waits.total(),
                      "copies": copies, "model_copies": own.copies,
                      "limit": LIMIT * matrices})  # fmt: skip
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, append to the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "launches.csv")
    options = parser.parse_args(arguments)
    lines = measure()
    append(options.csv, [machine() | line for line in lines])
    return int(any(line["launches"] > line["limit"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
