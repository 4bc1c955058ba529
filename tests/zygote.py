"""A process that has everything imported and forks a fresh program per request.

Real processes with real exit codes, without ten seconds of imports each. It reads one JSON request
a line on stdin: {"argv": [...], "cwd": ..., "out": ..., "err": ..., "faults": {...}, "env": {...}}
and answers with the exit code (-9 for a kill). argv[0] is a console script, or `python`, which is
followed by a script, `-c CODE` or `-m MODULE`. What trains and asks a model is imported when the
first console script is asked for, or the first `python` with "heavy": true; before that, what
stores and their service need. `faults` plants a SIGKILL inside the run:

    {"kill_step": g}          when the batch of step g is asked for
    {"copy_step": [g, path]}      no kill: copy output_dir, as a kill in its place would leave it
    {"interrupt_step": g}     no kill: Ctrl-C when the batch of step g is asked for
    {"kill_rows": n}          when n rows of a gradient export are done
    {"kill_saving": g}        inside the checkpoint of step g, its model written, its state not
    {"full_disk": [g, name]}  no kill: no room for more than 4 KiB a file in a method at step g
    {"trace": path}           no kill: write one line per step, with a hash of its micro-batches

Without "draws": true, the run draws no picture at its end: a fifth of its time.
With "given": text that is its standard input. With "background": true the answer is the child's
process id, at once; whoever asked ends it, and may ask {"wait": id} for its exit code.

With "imports": [...] these modules are imported first, before this fork and all later ones. With
"group": true the child has a process group of its own.

With "ranks": n it forks n workers, as torchrun would start them; each traces into `<path>.<rank>`.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import io
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

#: A configuration that needs nothing but this repository.
EXAMPLE = Path(__file__).resolve().parents[1] / "examples/train_lora/selectors/less.yaml"

#: What stores and their service import.
LIGHT = (
    "torch",
    "httpx",
    "pandas",
    "pyarrow.parquet",
    "pytest",
    "gradstore.cli.serving",
    "gradstore.scoring.influence",
    "gradstore.serve.running",
    "gradstore.store.verify",
    "gradstore.store.writer",
)

#: What a run imports on its way: most of the time of a small one. Imported once, before the forks.
HEAVY = (
    "llamafactory.train.tuner",
    "transformers.models.llama.modeling_llama",
    "zarr",
    "scipy.io",
    "gradkernels.cpu.sums",
    "dataflex.launch.build",
    "dataflex.cli",
    "dataflex.features.direct",
    "dataflex.selectors.less",
    "dataflex.launch.session",
    "torchdata.stateful_dataloader",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.table",
)


def plant(faults: dict[str, Any]) -> None:
    """Wrap the run's own trainer so that it kills the process, or tells what it serves."""
    from dataflex.launch import session

    make = session.trainer_class

    def make_faulty(*args: Any) -> type:
        return type("Faulty", (make(*args),), {"faults": faults, **FAULTY})

    session.trainer_class = make_faulty  # type: ignore[assignment]
    if "kill_rows" in faults:
        die_exporting(faults["kill_rows"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def serve_or_die(self: Any, *args: Any) -> Any:
    step = self.state.global_step
    if step == self.faults.get("kill_step"):
        die()
    if step == self.faults.get("copy_step", [None])[0]:
        shutil.copytree(self.args.output_dir, self.faults["copy_step"][1])
    if step == self.faults.get("interrupt_step"):
        os.kill(os.getpid(), signal.SIGINT)
    answer = super(type(self), self).get_batch_samples(*args)
    if "trace" in self.faults:
        digest = hashlib.sha256()
        for batch in answer[0]:
            digest.update(batch["input_ids"].numpy().tobytes())
        rank = f".{self.args.process_index}" if self.args.world_size > 1 else ""
        with open(self.faults["trace"] + rank, "a") as file:
            file.write(f"{step} {digest.hexdigest()}\n")
    return answer


def save_or_die(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
    if _internal_call and self.state.global_step == self.faults.get("kill_saving"):
        self.save_state_beside = lambda *_: die()
    without_room(self, "save_model", output_dir, _internal_call)


def save_optimizer(self: Any, output_dir: str) -> None:
    without_room(self, "_save_optimizer_and_scheduler", output_dir)


def without_room(self: Any, name: str, *args: Any) -> None:
    """Call the trainer's own method, on a full disk where that is asked for."""
    none, all_of_it = (4096, resource.RLIM_INFINITY), (resource.RLIM_INFINITY,) * 2
    if [self.state.global_step, name] == self.faults.get("full_disk"):
        resource.setrlimit(resource.RLIMIT_FSIZE, none)
    try:
        getattr(super(type(self), self), name)(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, all_of_it)


FAULTY = {"get_batch_samples": serve_or_die, "save_model": save_or_die,
          "_save_optimizer_and_scheduler": save_optimizer}  # fmt: skip


def die_exporting(rows: int) -> None:
    from gradstore.export import projected as module

    yield_rows, exported = module.exported, 0

    def counted(*inner: Any, **kwargs: Any) -> Any:
        nonlocal exported
        for part in yield_rows(*inner, **kwargs):
            exported += len(part.rows)
            if exported >= rows:
                die()
            yield part

    module.exported = counted


def run(request: dict[str, Any], rank: int | None = None) -> None:
    """In the forked child: become `dataflex-cli` (or another console script), or one worker."""
    for number, name in ((1, "out"), (2, "err")):
        path = request[name] + (f".{rank}" if rank else "")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # both may be one file
        os.dup2(os.open(path, flags), number)
    reading, writing = os.pipe()  # not the pipe from which the parent reads its requests
    os.write(writing, request.get("given", "").encode())
    os.close(writing)
    os.dup2(reading, 0)
    os.chdir(request["cwd"])
    for name, value in request.get("env", {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        if request.get("faults"):
            plant(request["faults"])
        if request["argv"][0] == "python":
            python(request["argv"][1:])
            sys.exit(0)
        if not request["draws"]:
            importlib.import_module("dataflex.report.picture").draw = lambda folder: None  # type: ignore[attr-defined]
        if rank is not None:
            from dataflex.launch.worker import worker
            from dataflex.run.messages import set_up_logging

            set_up_logging()
            sys.exit(worker(request["argv"][2:]))
        if request["argv"][0] == "llamafactory-cli":
            from llamafactory.cli import main
        else:
            from dataflex.cli import main
        sys.argv = request["argv"]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # of any kind: this is a child's end, whose exit code is the answer
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def python(argv: list[str]) -> None:
    """Run a script, `-c CODE` or `-m MODULE`, as the interpreter would."""
    what, *rest = argv
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path[0] = "" if what in ("-c", "-m") else os.path.dirname(what)
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(what, run_name="__main__")


def card_once() -> None:
    """Compile the template of the page that goes beside every adapter: it is at each save."""
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment

    Environment.compile = functools.cache(Environment.compile)  # type: ignore[method-assign]
    ModelCard.from_template(ModelCardData())


def draw_once() -> None:
    """Draw a picture as runs do at their end: fonts are found and loaded before the forks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([1, 2], label="a")
    axes.set_title("a")
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")


def import_all(modules: Sequence[str]) -> None:
    """Import them, and let what is here be no garbage: no child looks through it, or copies it."""
    new = [module for module in modules if module not in sys.modules]
    for module in new:
        importlib.import_module(module)
    if new:
        gc.collect()
        gc.freeze()


def warm_up() -> None:
    """Do here what every run does once in its life, before the forks."""
    import_all(HEAVY)
    # Asked which tokenizers or models there are, transformers imports the settings of every one.
    mapping = importlib.import_module("transformers.models.auto.tokenization_auto")
    list(mapping.TOKENIZER_MAPPING.keys())
    models = importlib.import_module("transformers.models.auto.modeling_auto")
    for name in ("IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_TO_WAVEFORM", "CAUSAL_LM"):
        list(getattr(models, f"MODEL_FOR_{name}_MAPPING").keys())
    # What a run reads, imports and compiles once in its life, it has from here.
    importlib.import_module("dataflex.config.presets").presets_of("selectors")
    registry = importlib.import_module("dataflex.config.registry")
    for _, kind in registry.KINDS.values():
        registry.strategies(kind)
    importlib.import_module("dataflex.launch.configuration").read(EXAMPLE, [])
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
    card_once()
    templates = importlib.import_module("dataflex.report.page").templates()
    for name in templates.list_templates(extensions=["j2"]):
        templates.get_template(name)
    # numba sets itself up to read the machine code that it has cached.
    compiled = importlib.import_module("gradkernels.cpu.compiled")
    compiled.sjlt()
    compiled.rademacher()
    draw_once()
    gc.collect()
    gc.freeze()


def serve(answers: TextIO) -> None:
    """Fork one child per request, answer with its exit code."""
    warm = False
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            code = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            print(code, file=answers, flush=True)
            continue
        if not warm and (request["argv"][0] != "python" or request["heavy"]):
            warm_up()
            warm = True
        import_all(request.get("imports", ()))
        world = request.get("ranks", 1)
        request.setdefault("env", {}).update(_as_torchrun_sets(world) if world > 1 else {})
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                run(request, rank if world > 1 else None)
            if request.get("group"):
                os.setpgid(child, child)  # before anyone can send a signal to its group
            children.append(child)
        if request.get("background"):
            print(children[0], file=answers, flush=True)
            continue
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(next((code for code in codes if code), 0), file=answers, flush=True)


def _as_torchrun_sets(world: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip


if __name__ == "__main__":
    # Libraries print while they are imported: stdout carries answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all(LIGHT)
    serve(answers)
