"""Options that commands of `dataflex-cli` share or have many of; nothing heavy is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.cli.care import DryRun
from gradstore.cli.options import AsJson, Checkpoints, OnEngine, Run, StorePath, path_at_home
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from gradstore.cluster.options import RayOptions
    from gradstore.storage.leases import Worker

Config = Annotated[
    Path,
    typer.Argument(help="YAML or JSON configuration.", metavar="CONFIG", parser=path_at_home),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show what LlamaFactory and transformers say, too.")
]


@dataclass(frozen=True, kw_only=True)
class Builders(OnEngine):
    """The options of `build` that say who builds."""

    worker: Annotated[
        str | None,
        typer.Option(
            help="Build as worker i of N, started as often and wherever you like: they share the "
            "work through the store, on a file system that all of them see. Default: a rank that "
            "torchrun started is one.",
            metavar="i/N",
        ),
    ] = None
    lease_seconds: Annotated[
        float | None,
        typer.Option(
            help="Of workers: seconds of silence after which others take over the work of one. "
            "Give all of them the same, longer than their file system takes to show a change. "
            "Default: 60."
        ),
    ] = None
    gpus_per_actor: Annotated[
        float | None,
        typer.Option(help="GPUs of each; 0.5 for half of one. Default: 1 where there are any."),
    ] = None
    memory_per_actor: Annotated[
        float | None, typer.Option(help="GiB of memory that each reserves.")
    ] = None

    def chosen(self) -> tuple[Worker | None, RayOptions | None]:
        """Check and read them: this process among workers, and the cluster; at most one is given.

        A process that torchrun started is a worker, where nothing else is asked for.

        Raises:
            BadInput: both, what one of them refuses, or a lease of no worker.
        """
        from gradstore.storage.leases import Worker

        ray = self.ray(self.gpus_per_actor, self.memory_per_actor)
        if self.worker is not None and ray is not None:
            raise BadInput(
                "--worker and --engine are both given: the engine starts workers of its own; give "
                "one of them. (Workers may join a build on an engine at any time.)"
            )
        worker = None
        if self.worker is not None:
            worker = Worker.parse(self.worker)
        elif ray is None:
            worker = rank_as_worker(os.environ)
        if self.lease_seconds is None:
            return worker, ray
        if ray is not None:
            raise BadInput("--lease-seconds is not for --engine: its actors have the usual lease.")
        if worker is None:
            raise BadInput(
                f"--lease-seconds {self.lease_seconds:g} is for workers that share a build: give "
                "--worker i/N too, or start them with torchrun"
            )
        return replace(worker, lease_seconds=self.lease_seconds), ray


#: Variables by which libraries find the other ranks, which a worker has no need of.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_as_worker(env: MutableMapping[str, str]) -> Worker | None:
    """Make this process, if it is one of torchrun's ranks, a worker of the store.

    Ranks of a build have nothing to say to each other but what the store tells: no process group is
    made, and one that is started again, or late, takes what is left.

    Args:
        env: os.environ; what would make libraries wait for the other ranks is removed.

    Returns:
        Worker RANK + 1 of WORLD_SIZE; None where this is one process alone.

    Raises:
        BadInput: the variables are not whole numbers that fit each other.
    """
    from gradstore.storage.leases import Worker

    rank, world = env.get("RANK", "0"), env.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise BadInput(
            f"RANK is {rank!r} and WORLD_SIZE {world!r}: torchrun sets them to a number and how "
            "many there are; unset both, or give --worker i/N"
        )
    for name in _OF_RANKS:
        env.pop(name, None)
    return None if world == "1" else Worker(int(rank) + 1, int(world))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The options of `eval` that say what is measured, and at what cost."""

    store: StorePath
    config: Config
    bank: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what was measured: lds, qld need one for the losses of "
            "retrained models; tail_patch goes on from one.",
            parser=path_at_home,
        ),
    ] = None
    budget: Annotated[int, typer.Option(help="Retrainings that may be made now.")] = 0
    metric: Annotated[
        str,
        typer.Option(
            help="lds: order of retrained models; qld: loss without the top rows; tail_patch: what "
            "a step on a top row gains; spearman, ndcg, overlap: against --truth; recall, mrr, "
            "auprc: of --planted rows."
        ),
    ] = "lds"
    subsets: Annotated[int, typer.Option(help="lds: random subsets to retrain on.")] = 100
    fraction: Annotated[float, typer.Option(help="lds: share of the rows in a subset.")] = 0.5
    share: Annotated[
        float | None,
        typer.Option(help="Share of the rows to take; default: .01 of qld, .05 of overlap."),
    ] = None
    controls: Annotated[int, typer.Option(help="qld: retrainings without random rows.")] = 10
    seeds: Annotated[
        int, typer.Option(help="lds, qld: trainings of each subset, whose losses are averaged.")
    ] = 1
    order: Annotated[
        str,
        typer.Option(
            help="lds, qld: run, a retrained model sees its rows in the order of the whole run; "
            "redrawn, in one of its own."
        ),
    ] = "run"
    interval: Annotated[
        str,
        typer.Option(
            help="queries: how the mean would differ with other queries; both, lds and qld: with "
            "other retrained models too."
        ),
    ] = "queries"
    seed: Annotated[int, typer.Option(help="Of random subsets and rows.")] = 0
    checkpoints: Checkpoints = "last"
    normalize: Annotated[
        str | None,
        typer.Option(help="As of `gradstore score`; default: what CONFIG's component selects by."),
    ] = None
    preconditioner: Annotated[str | None, typer.Option(help="As --normalize.")] = None
    damping: Annotated[float | None, typer.Option(help="As --normalize.")] = None
    scores: Annotated[
        Path | None,
        typer.Option(
            help=".parquet (row, score) or .npy (queries, rows), with which STORE may be -; "
            "default: the store's influence.",
            parser=path_at_home,
        ),
    ] = None
    truth: Annotated[
        Path | None,
        typer.Option(help="Table of `gradstore replay -o`, as .parquet.", parser=path_at_home),
    ] = None
    planted: Annotated[
        str,
        typer.Option(
            help="Column of the files that says which rows are planted: by a number or true, for "
            "every query; by text, for the target rows with the same text.",
            metavar="COLUMN",
        ),
    ] = ""
    k: Annotated[
        int | None,
        typer.Option(help="Rows at the top; default: 50 of recall, 20 of ndcg and tail_patch."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The options of `replay` that say what is differentiated, and at what cost."""

    config: Config
    targets: Annotated[
        str, typer.Option(help="sets: mean loss of each target set; rows: each target row's.")
    ] = "sets"
    float32: Annotated[
        bool, typer.Option("--float32", help="Differentiate in float32: faster, less exact.")
    ] = False
    segment: Annotated[
        int | None, typer.Option(help="Steps between kept states; default: the fewest states.")
    ] = None
    hours: Annotated[float, typer.Option(help="Refuse a replay that takes longer.")] = 1.0
    memory: Annotated[float, typer.Option(help="Refuse above so many GiB of states.")] = 8.0


@dataclass(frozen=True, kw_only=True)
class Repair:
    """The options of `repair`."""

    store: StorePath
    config: Annotated[
        Path | None,
        typer.Argument(
            help="Configuration of the run or build, for rows that must be computed again.",
            metavar="CONFIG",
            parser=path_at_home,
        ),
    ] = None
    new_attempt: Annotated[
        bool,
        typer.Option("--new-attempt", help="Commit rows that come out otherwise as a new attempt."),
    ] = False
    dry_run: DryRun = False
    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The options of `explain` that say what is asked, and which model."""

    store: StorePath
    prompt: Annotated[str | None, typer.Option(help="What the model is asked.")] = None
    response: Annotated[
        str | None, typer.Option(help="The answer; without one the model answers.")
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"prompt": ..., "response": ...} of several questions.',
            parser=path_at_home,
        ),
    ] = None
    generation: Annotated[
        str | None, typer.Option(help="Train generation to ask; default: the newest.")
    ] = None
    checkpoints: Checkpoints = "last"
    run: Run = ""
    model: Annotated[
        Path | None,
        typer.Option(help="Where the base model is now.", parser=path_at_home),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Where the checkpoint, or the folder of them, is now.",
            parser=path_at_home,
        ),
    ] = None
    verbose: Verbose = False
