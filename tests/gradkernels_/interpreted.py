"""A process in which Triton interprets its kernels on the CPU: it answers the tests beside it.

Triton decides at its import whether it compiles or interprets, so that needs a process of its own.
Started as a script it reads pickled requests from stdin and writes pickled answers to stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from gradkernels import Feature, ProjectionSpec, methods

CPU = torch.device("cpu")


class Interpreter:
    """The process, from the side of the tests."""

    def __init__(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout
        pickle.load(self._process.stdout)  # once Triton and the kernels are imported

    def sums(
        self,
        spec: ProjectionSpec,
        blocks: Sequence[tuple[torch.Tensor, int]],
        **constants: int,
    ) -> torch.Tensor:
        """Sums (b, d) float64 of blocks (b, m) and where they start; constants of gpu.sums."""
        found: torch.Tensor = self._ask("sums", (spec, blocks, constants))
        return found

    def features(
        self,
        spec: ProjectionSpec,
        x: torch.Tensor,
        start: int,
        feature: Feature | None,
        factors: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums (b, d) and squared norms (b,) float64 of the features of x (b, m)."""
        found: tuple[torch.Tensor, torch.Tensor]
        found = self._ask("features", (spec, x, start, feature, factors))
        return found

    def difference(
        self, method: str, width: int, kind: str | None = None, fault: str = ""
    ) -> str | None:
        """Ask the test at first use, on kernels with a planted fault."""
        found: str | None = self._ask("difference", (method, width, kind, fault))
        return found

    def rotated(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Rotate rows (k, d) float32."""
        found: torch.Tensor = self._ask("rotated", (x, seed))
        return found

    def rotation_difference(self, fault: str = "") -> str | None:
        """Ask the test at first use of rotations, on a kernel with a planted fault."""
        found: str | None = self._ask("rotation_difference", (fault,))
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, name: str, arguments: tuple[Any, ...]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump((name, arguments), self._process.stdin)
        self._process.stdin.flush()
        good, found = pickle.load(self._process.stdout)
        assert good, found
        return found


def made(spec: ProjectionSpec, rows: int) -> Any:
    return methods.sums_of(spec.method, "triton")(spec, rows, CPU)


def sums_of(
    spec: ProjectionSpec,
    blocks: Sequence[tuple[torch.Tensor, int]],
    constants: dict[str, int],
) -> torch.Tensor:
    from gradkernels.gpu import sums as module

    before = {name: getattr(module, name) for name in constants}
    vars(module).update(constants)
    try:
        ours = made(spec, len(blocks[0][0]))
        for block, start in blocks:
            ours.add(block, start)
        return ours.total().clone()
    finally:
        vars(module).update(before)


def features_of(
    spec: ProjectionSpec,
    x: torch.Tensor,
    start: int,
    feature: Feature | None,
    factors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    ours = made(spec, len(x))
    ours.add(x, start, feature, factors)
    return ours.total().clone(), ours.squares().clone()


def difference(method: Any, width: int, kind: Any, fault: str) -> str | None:
    from gradkernels.gpu import sums as module
    from gradkernels.gpu import usable

    signed, given = module.signed, module.arguments
    if fault == "key":  # words of another matrix
        module.signed = lambda key: signed(key) ^ 1
    if fault == "outer":  # another feature
        module.arguments = lambda *of: (*given(*of)[:-1], 0.0)
    try:
        params = 100 if method == "rademacher" else 50
        return usable.difference(CPU, method, width, kind, params=params, outputs=200)
    finally:
        module.signed, module.arguments = signed, given


def rotated(x: torch.Tensor, seed: int) -> torch.Tensor:
    from gradkernels.gpu import rotation

    return rotation.rotated(x, seed)


def rotation_difference(fault: str) -> str | None:
    from gradkernels.gpu import rotation, usable

    order = rotation.order_of
    if fault == "order":  # coordinates that stay where they are
        rotation.order_of = lambda dim: None
    try:
        return usable.rotation_difference(CPU, (64, 50))
    finally:
        rotation.order_of = order


def make_index_work() -> None:
    """Let a loop's bounds be numbers of the interpreter, which holds them as arrays of one."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any = None) -> Any:
        done = patch(tensor) if scope is None else patch(tensor, scope)

        def index(self: Any) -> int:
            return int(self.handle.data.reshape(-1)[0])

        if scope is None:
            tensor.__index__ = index
        else:
            scope.set_attr(tensor, "__index__", index)
        return done

    interpreter._patch_lang_tensor = patched


def main() -> None:
    make_index_work()
    from gradkernels.gpu import sums

    answered = {"sums": sums_of, "features": features_of, "difference": difference,
                "rotated": rotated, "rotation_difference": rotation_difference}  # fmt: skip
    answers = sys.stdout.buffer
    pickle.dump(sums.__name__, answers)
    answers.flush()
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, answered[name](*arguments)
        except Exception:  # to be raised by whoever asked
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
