"""A process that has everything imported and forks a fresh `dataflex-cli` per request.

Real processes with real exit codes, without ten seconds of imports each. It reads one JSON request
a line on stdin: {"argv": [...], "cwd": ..., "out": ..., "err": ..., "faults": {...}, "env": {...}}
and answers with the exit code (-9 for a kill). `faults` plants a SIGKILL inside the run:

    {"kill_step": g}          when the batch of step g is asked for
    {"interrupt_step": g}     no kill: Ctrl-C when the batch of step g is asked for
    {"kill_rows": n}          when n rows of a gradient export are done
    {"kill_saving": g}        inside the checkpoint of step g, its model written, its state not
    {"trace": path}           no kill: write one line per step, with a hash of its micro-batches
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

#: What a run imports on its way: most of the time of a small one. Imported once, before the forks.
IMPORTED = (
    "llamafactory.train.tuner",
    "transformers.models.llama.modeling_llama",
    "zarr",
    "scipy.io",
    "gradkernels.cpu.sums",
    "dataflex.build",
    "dataflex.cli",
    "dataflex.scoring",
    "dataflex.selectors.less",
    "dataflex.session",
    "torchdata.stateful_dataloader",
    "rich.table",
)


def plant(faults: dict[str, Any]) -> None:
    """Wrap the run's own functions so that they kill the process, or tell what they serve."""
    from dataflex.trainers import select
    from dataflex.trainers.seam import Seam

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    serve, save, export = Seam.get_batch_samples, Seam.save_model, select.SelectSeam._select
    exported = 0

    def serve_or_die(self: Any, *args: Any) -> Any:
        step = self.state.global_step
        if step == faults.get("kill_step"):
            die()
        if step == faults.get("interrupt_step"):
            os.kill(os.getpid(), signal.SIGINT)
        answer = serve(self, *args)
        if "trace" in faults:
            digest = hashlib.sha256()
            for batch in answer[0]:
                digest.update(batch["input_ids"].numpy().tobytes())
            with open(faults["trace"], "a") as file:
                file.write(f"{step} {digest.hexdigest()}\n")
        return answer

    def save_or_die(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
        if _internal_call and self.state.global_step == faults.get("kill_saving"):
            self.save_state_beside = lambda checkpoint: die()
        save(self, output_dir, _internal_call)

    def select_or_die(self: Any, *args: Any) -> Any:
        if "kill_rows" in faults:
            from gradstore import export as module

            yield_rows = module.export_features

            def counted(*inner: Any, **kwargs: Any) -> Any:
                nonlocal exported
                for part in yield_rows(*inner, **kwargs):
                    exported += len(part.rows)
                    if exported >= faults["kill_rows"]:
                        die()
                    yield part

            module.export_features = counted
        return export(self, *args)

    Seam.get_batch_samples = serve_or_die  # type: ignore[method-assign]
    Seam.save_model = save_or_die  # type: ignore[method-assign]
    select.SelectSeam._select = select_or_die  # type: ignore[method-assign]


def run(request: dict[str, Any]) -> None:
    """In the forked child: become `dataflex-cli` (or another console script)."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["cwd"])
    os.environ.update(request.get("env", {}))
    code = 1
    try:
        if request.get("faults"):
            plant(request["faults"])
        if request["argv"][0] == "llamafactory-cli":
            from llamafactory.cli import main
        else:
            from dataflex.cli import main
        sys.argv = request["argv"]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(answers: TextIO) -> None:
    """Fork one child per request, answer with its exit code."""
    for module in IMPORTED:
        importlib.import_module(module)
    # Asked which tokenizers there are, transformers imports the settings of every model.
    mapping = importlib.import_module("transformers.models.auto.tokenization_auto")
    list(mapping.TOKENIZER_MAPPING.keys())

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    # Libraries print while they are imported: stdout carries answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(answers)
