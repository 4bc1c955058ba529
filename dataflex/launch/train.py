"""From a checked configuration to a running training: in this process, or under torchrun.

Under torchrun every failure would exit 1 with pages of text. So the parent checks the configuration
first; a failing rank leaves its exit code and message in a file, and the parent alone reports them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.bridge import arguments, running
from dataflex.config.keys import RunConfig
from dataflex.config.presets import Component
from dataflex.launch.packages import check_reporters
from dataflex.launch.preflight import check
from dataflex.run.messages import Failure, RemoteFailure

#: Environment variable: folder in which each failing rank leaves `<rank>.json`.
FAILURES = "DATAFLEX_FAILURES"

_log = logging.getLogger(__name__)


def train(config: RunConfig, overrides: Sequence[str], *, dry_run: bool = False) -> None:
    """Check, then train here or under torchrun as LlamaFactory would: `dataflex-cli train`.

    Args:
        config: as `configuration.read` read it.
        overrides: those of the command line, for the workers, which read it again.
        dry_run: forecast what training takes, instead.
    """
    check_reporters(config.llamafactory)
    component = check(config)
    if dry_run:
        _forecast(config, component)
    elif _enabled("FORCE_TORCHRUN") or arguments.device_count() > 1:
        _torchrun(config.path, overrides)
    else:
        run(config, component)


def _forecast(config: RunConfig, component: Component | None) -> None:
    """Print what training would take; train nothing, write nothing."""
    from dataflex.launch.dry_run import static_rows, train_forecast, workers_of
    from dataflex.run.forecast import print_forecasts, print_nothing_to_forecast

    if component is None:
        print_nothing_to_forecast(static_rows(config, _static(config)))
        return
    workers = workers_of(os.environ)
    print_forecasts(train_forecast(config, component, workers), workers)


def run(config: RunConfig, component: Component | None) -> None:
    """Train in this process."""
    if component is None:
        running.run_untouched(_static(config))
        return
    from dataflex.launch.session import TrainSession

    session = TrainSession(config, component)
    with contextlib.closing(session), session.shown():
        running.run_replaced(config, session)


def _static(config: RunConfig) -> dict[str, Any]:
    """Pass on LlamaFactory's own keys; of ours `train_step` has a meaning there, as `max_steps`."""
    ours, args = config.dataflex, dict(config.llamafactory)
    if ours.train_step > 0:
        args["max_steps"] = ours.train_step
    if ours.early_stopping_min_delta:
        _log.warning("early_stopping_min_delta has no effect with train_type static")
    return args


def _torchrun(path: Path, overrides: Sequence[str]) -> None:
    """Start the workers; NNODES, NODE_RANK, ... mean what they mean to LlamaFactory."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FAILURES] = folder
        arguments = [
            *_rendezvous(os.environ),
            "-m",
            "dataflex.launch.worker",
            str(path),
            *overrides,
        ]
        _one_thread_each(arguments[arguments.index("--nproc-per-node") + 1])
        config, command, command_args = config_from_args(get_args_parser().parse_args(arguments))
        try:
            elastic_launch(config, command)(*command_args)
        except ChildFailedError as error:
            raise RemoteFailure(_first_failure(Path(folder), error)) from error
        except SignalException as error:  # torch has stopped the workers by now
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise SystemExit(128 + error.sigval) from error


def _one_thread_each(workers: str) -> None:
    """Set what torch would set under a banner of its own, and say so in one line."""
    if workers != "1" and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        _log.info("%s processes with one CPU thread each; OMP_NUM_THREADS sets another number",
                  workers)  # fmt: skip


def _rendezvous(env: Mapping[str, str]) -> list[str]:
    workers = env.get("NPROC_PER_NODE") or str(max(1, arguments.device_count()))
    address = env.get("MASTER_ADDR", "127.0.0.1")
    port = env.get("MASTER_PORT") or str(_free_port())
    nodes = env.get("NNODES", "1")
    common = ["--nproc-per-node", workers, "--max-restarts", env.get("MAX_RESTARTS", "0")]
    if "RDZV_ID" not in env:
        return [*common, "--nnodes", nodes, "--node-rank", env.get("NODE_RANK", "0"),
                "--master-addr", address, "--master-port", port]  # fmt: skip
    if "MIN_NNODES" in env and "MAX_NNODES" in env:
        nodes = f"{env['MIN_NNODES']}:{env['MAX_NNODES']}"
    return [*common, "--nnodes", nodes, "--rdzv-id", env["RDZV_ID"], "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"{address}:{port}"]  # fmt: skip


def _first_failure(folder: Path, error: Any) -> Failure:  # noqa: ANN401 - a ChildFailedError
    """Read the lowest rank's failure; a rank that was killed or met a bug leaves none."""
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        try:
            return Failure(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    rank, first = error.get_first_failure()
    return Failure(1, f"worker {rank} ended with exit code {first.exitcode}; "
                      "its own messages are above.")  # fmt: skip


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enabled(name: str) -> bool:
    return os.environ.get(name, "0").lower() in {"true", "y", "1"}
