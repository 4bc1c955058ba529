"""Kill workers of a store at random, again and again, beside readers that verify what they see.

    uv run python tests/stress.py --kills 500                      # in a folder
    uv run python tests/stress.py --minutes 30 --place s3://bucket/stress    # in a bucket
    uv run python tests/stress.py --kills 100 --service            # behind a service, one a store
    uv run python tests/stress.py --kills 50 --launcher torchrun   # ranks, of which rank 0 writes
    uv run python tests/stress.py --kills 50 --launcher ray        # tasks of Ray

One to four workers at a time, their number changing, fill a small store. One after another is ended
by SIGKILL wherever it is; others are started in its place. Now and then one is stopped, for longer
than its lease may last, and goes on to find its work taken. After each kill a process of its own
opens the store, and every generation that it sees must be whole. When all are committed and the
last workers have ended by themselves the store must hold, byte for byte, what one process writes:
no row lost, doubled or torn. Then the next store begins, until there were enough kills. Under
torchrun a rank is ended, its launcher ends the others, and all are started again; under Ray the
process of a task is, and Ray starts the task again.

Run by `test_workers.py` and `test_elsewhere.py` for some kills. Exit code: 0, or 1 where something
was not as it must be: the store is left for inspection.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName
from gradstore.format.records import GenerationRecord, RowSet, row_hash
from gradstore.format.text_table import Text
from gradstore.serve.running import Offer, serve
from gradstore.storage.leases import Worker
from gradstore.storage.places import reads_at
from gradstore.storage.reading import ReadFiles
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

ROWS, DIM, UNIT_ROWS = 40, 4, 4
NAMES = ("target/skill/1", "train/1", "train/2")
PROVENANCE: dict[str, Any] = {
    "projection": {"method": "sjlt", "seed": 0, "d": DIM},
    "what": "stress",
}

#: Seconds: a worker's work on a unit, the life of a lease, and the longest wait before a kill.
PAUSE, LEASE, LONGEST = 0.004, 0.3, 0.08
#: Part of the kills before which another worker, or the same, is stopped for up to two leases.
STOPPED = 0.2
#: Times as long may a worker of a service live: each of its steps is a request.
SLOWER = 8
#: Seconds that a rank, or a task of Ray, works on a unit, and may live from its first one on.
SLOW_PAUSE, LONGEST_STARTED = 0.03, 1.5

#: What a worker, in a folder or behind a service, and in a bucket, would take longer to import than
#: it lives.
IMPORTED = (("httpx", "httpcore", "pandas", "pyarrow.parquet"),
            ("obstore.store", "pandas", "pyarrow.parquet"))  # fmt: skip
#: Exit code of a look at a store, where it is well: this and the number of its generations.
WELL = 10


#: Makes the features of a unit, of the whole generation's (ROWS, DIM).
Compute = Callable[[np.ndarray, int, int], np.ndarray]


def at_once(features: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Compute in this process."""
    time.sleep(PAUSE)
    return features[start:stop]


def build(place: str, worker: Worker | None, compute: Compute = at_once) -> None:
    """Build every generation, as one worker or alone."""
    rows = RowSet.from_hashes([row_hash([i, i + 1], [-100, i]) for i in range(ROWS)])
    with StoreWriter(place, provenance=PROVENANCE, worker=worker) as writer:
        for seed, name in enumerate(NAMES):
            parsed = GenerationName.parse(name)
            record = GenerationRecord(
                name=name, role=parsed.role, set=parsed.set, step=parsed.step, run_id="stress",
                adapter_hash="aa", effective_seed=0, projection=PROVENANCE["projection"],
                feature="sgd",
            )  # fmt: skip
            features = np.random.default_rng(seed).standard_normal((ROWS, DIM), dtype=np.float32)
            generation = writer.begin(record, rows, dim=DIM, unit_rows=UNIT_ROWS)
            writer.keep_texts(rows, (Text(f"prompt {i}", f"answer {i}", 3) for i in range(ROWS)))
            for unit in generation.claimed():
                k = unit.stop - unit.start
                generation.write_unit(
                    unit.index, compute(features, unit.start, unit.stop), np.ones(k, np.float32),
                    np.full(k, RowStatus.OK, np.uint8), np.arange(k, dtype=np.int32),
                )  # fmt: skip
            generation.commit()


def look(place: str) -> int:
    """Read all that is committed; return how many generations are."""
    try:
        store = open_store(place)
    except BadInput:  # not made yet
        return 0
    for generation in store.generations():
        assert np.isfinite(generation.read(0, ROWS)).all(), generation.name
        generation.check_values()
    told = verify_store(place)
    assert told.ok, told.faults
    return len(store.generations())


def content(place: str) -> dict[str, Any]:
    """Every byte that a reader may see; of commits, and the root, all but the store's own id."""
    files = reads_at(place)
    found: dict[str, Any] = {}
    tops = [name for name in files.names("") if name not in ("staging", "writer.lock")]
    for name in [each for top in tops for each in below(files, top)]:
        data = files.read(name)
        found[name] = data if name != "zarr.json" else len(data)
        if name.startswith("commits/"):
            commit = json.loads(data)
            found[name] = {
                key: commit[key] for key in commit.keys() - {"store_uuid", "parent", "sha256"}
            }
    return found


def below(files: ReadFiles, top: str) -> list[str]:
    """List a file, or the files of a folder."""
    return [top] if files.kind(top) == "file" else files.walk(top)


def compare(place: str, alone: str) -> None:
    """Compare a store with that of one process."""
    found, wanted = content(place), content(alone)
    differ = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    assert not differ, sorted(differ)


# ---- processes -------------------------------------------------------------------------------


def forked(act: Callable[[], int | None]) -> int:
    """Run it in a process of its own, which exits with what it returns; return its id.

    This process itself touches no store: a client of a bucket does not survive a fork.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = act() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a process; return its exit code, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def must(act: Callable[[], int | None], what: str) -> int:
    """Run it in a process of its own; return its exit code, which must not be 1."""
    code = ended(forked(act))
    if code == 1 or code < 0:
        raise SystemExit(f"{what}: exit code {code}")
    return code


@contextmanager
def served(folder: str) -> Iterator[str]:
    """Serve a folder, in a process of its own that takes writes; its address."""
    reading, writing = os.pipe()

    def say(address: str, key: str | None) -> None:
        os.write(writing, f"{address}\n".encode())

    child = forked(lambda: serve(Path(folder), 0, say, None, Offer(writable=True)))
    os.close(writing)
    try:
        with os.fdopen(reading) as told:
            address = told.readline().strip()
        yield address.partition("/?")[0]
    finally:
        os.kill(child, signal.SIGTERM)
        ended(child)


def killed_until_done(place: str, draw: random.Random) -> int:
    """Fill one store while workers are killed; return how many were."""
    living: set[int] = set()
    kills = committed = 0
    while committed < len(NAMES):
        count = draw.randint(1, 4)
        while len(living) < count:
            worker = Worker(draw.randint(1, count), count, LEASE)
            living.add(forked(lambda worker=worker: build(place, worker)))  # type: ignore[misc]
        if draw.random() < STOPPED:
            sleeper = draw.choice(sorted(living))
            os.kill(sleeper, signal.SIGSTOP)
            time.sleep(draw.uniform(0, 2 * LEASE))
            os.kill(sleeper, signal.SIGCONT)
        time.sleep(draw.uniform(0, LONGEST * (SLOWER if place.startswith("http") else 1)))
        victim = draw.choice(sorted(living))
        os.kill(victim, signal.SIGKILL)
        living.discard(victim)
        code = ended(victim)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"a worker of {place}: exit code {code}")
        kills += code != 0
        committed = must(lambda: WELL + look(place), f"a look at {place}") - WELL
    for child in living:
        if code := ended(child):
            raise SystemExit(f"a worker of {place} that was left alone: exit code {code}")
    return kills


# ---- other launchers -------------------------------------------------------------------------


def as_rank(place: str) -> None:
    """Build under torchrun: every rank computes rows of a unit, and rank 0 writes them."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def shared(features: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        asked: list[Any] = [(features, start, stop)]
        dist.broadcast_object_list(asked)
        features, start, stop = asked[0]
        if features is None:
            dist.barrier()
            os._exit(0)  # a process group that is still there when Python ends may abort
        time.sleep(SLOW_PAUSE)
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, features[start + rank : stop : ranks])
        found = np.empty((stop - start, DIM), np.float32)
        for i, part in enumerate(parts):
            found[i::ranks] = part
        return found

    if rank == 0:
        print("begun", flush=True)
        build(place, None, shared)
        shared(None, 0, 0)
    while True:
        shared(None, 0, 0)


def as_driver(place: str) -> None:
    """Build by tasks of Ray, each a worker; Ray starts one again whose process has ended."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    def slowly(features: np.ndarray, start: int, stop: int) -> np.ndarray:
        time.sleep(SLOW_PAUSE)
        return features[start:stop]

    count = random.Random(place).randint(2, 4)
    ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    task = ray.remote(num_cpus=1, max_retries=-1)(build)
    workers = [Worker(i + 1, count, LEASE) for i in range(count)]
    print("begun", flush=True)
    ray.get([task.remote(place, worker, slowly) for worker in workers])


@contextmanager
def started(
    launcher: str, place: str, draw: random.Random
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Start ranks, or a driver, which end with the block; yield it, and what tells its errors."""
    command = [sys.executable, __file__, "--as-driver", place]
    if launcher == "torchrun":
        ranks = f"--nproc-per-node={draw.randint(2, 3)}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks, __file__,
                   "--as-rank", place]  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        assert process.stdout is not None

        def errors() -> str:
            said.seek(0)
            return said.read()[-3000:]

        try:
            if not process.stdout.readline():
                raise SystemExit(f"{launcher} does not start: {errors()}")
            yield process, errors
        finally:
            if process.poll() is None:
                for each in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
            process.kill()
            process.wait()
            process.stdout.close()


def victims(launcher: psutil.Process) -> list[psutil.Process]:
    """List the ranks, or the processes of Ray's tasks that are at work."""
    found = []
    for each in launcher.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = " ".join(each.cmdline())
            if "--as-rank" in words or "ray::build" in words:
                found.append(each)
    return found


def killed_under(launcher: str, place: str, draw: random.Random) -> int:
    """Fill one store under torchrun or Ray while processes are killed; return how many were."""
    kills = committed = 0
    while committed < len(NAMES):
        with started(launcher, place, draw) as (process, errors):
            killed = False
            while process.poll() is None and not (killed and launcher == "torchrun"):
                time.sleep(draw.uniform(0, LONGEST_STARTED))
                if process.poll() is None and (alive := victims(psutil.Process(process.pid))):
                    draw.choice(alive).kill()
                    kills, killed = kills + 1, True
                committed = must(lambda: WELL + look(place), f"a look at {place}") - WELL
            code = process.wait()
            if code and not (killed and launcher == "torchrun"):
                raise SystemExit(f"{launcher} of {place}: exit code {code}: {errors()}")
        committed = must(lambda: WELL + look(place), f"a look at {place}") - WELL
    return kills


def main() -> int:
    """Kill until there were enough; print what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="at least so many")
    parser.add_argument("--minutes", type=float, default=0, help="at least so long")
    parser.add_argument("--place", help="a folder, or s3://BUCKET/PREFIX, for the stores")
    parser.add_argument("--service", action="store_true", help="each behind a server of its own")
    parser.add_argument("--launcher", choices=["torchrun", "ray"], help="who starts the workers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="append a line of what was done")
    parser.add_argument("--as-rank", metavar="PLACE", help=argparse.SUPPRESS)
    parser.add_argument("--as-driver", metavar="PLACE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if place := options.as_rank or options.as_driver:
        (as_rank if options.as_rank else as_driver)(place)
        return 0
    if options.kills <= 0 and options.minutes <= 0:
        parser.error("nothing to do: give --kills or --minutes")
    began, draw = time.monotonic(), random.Random(options.seed)
    folder = tempfile.mkdtemp(prefix="stress-")
    top, alone = options.place or folder, f"{folder}/alone"
    os.environ.setdefault("GRADSTORE_TOKEN", "a-key-of-the-stress-to-read")
    os.environ.setdefault("GRADSTORE_WRITE_TOKEN", "a-key-of-the-stress-to-write")
    for module in IMPORTED[top.partition(":")[0] == "s3"]:
        importlib.import_module(module)
    must(lambda: build(alone, None), "a single process")
    kills = stores = 0
    while kills < options.kills or time.monotonic() - began < 60 * options.minutes:
        where = f"{top}/{os.getpid()}-{stores}"
        with served(where) if options.service else nullcontext(where) as place:
            if options.launcher:
                kills += killed_under(options.launcher, place, draw)
            else:
                kills += killed_until_done(place, draw)
            must(lambda: build(place, None), f"a last process at {place}")
            must(lambda: compare(place, alone), f"what {place} holds")
        stores += 1
    shutil.rmtree(folder)
    if options.csv:
        among = {"launcher": options.launcher or "processes", "place": kind_of(options),
                 "kills": kills, "stores": stores,
                 "seconds": round(time.monotonic() - began), "seed": options.seed}  # fmt: skip
        noted(options.csv, among)
    print(f"{kills} workers killed over {stores} stores, in {time.monotonic() - began:.0f} s: "
          "0 rows lost, 0 doubled, 0 torn")  # fmt: skip
    return 0


def kind_of(options: argparse.Namespace) -> str:
    """Name where the stores were: in a folder, a bucket, or behind a service."""
    if options.service:
        return "service"
    return "bucket" if str(options.place or "").startswith("s3:") else "folder"


def noted(path: Path, line: dict[str, Any]) -> None:
    """Append a line to a CSV, with a head where it is new."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["date", *line], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({"date": datetime.now(UTC).date().isoformat()} | line)


if __name__ == "__main__":
    raise SystemExit(main())
