"""Kill workers of a store at random, again and again, beside readers that verify what they see.

    uv run python tests/stress.py --kills 500                      # in a folder
    uv run python tests/stress.py --minutes 30 --place s3://bucket/stress    # in a bucket
    uv run python tests/stress.py --kills 100 --service            # behind a service, one a store
    uv run python tests/stress.py --kills 50 --launcher torchrun   # ranks of `gradstore build`
    uv run python tests/stress.py --kills 50 --launcher ray        # actors of `... --engine ray`

One to four workers at a time, their number changing, fill a small store. One after another is ended
by SIGKILL wherever it is; others are started in its place. Now and then one is stopped, for longer
than its lease may last, and goes on to find its work taken. After each kill a process of its own
opens the store, and every generation that it sees must be whole. When all are committed and the
last workers have ended by themselves the store must hold, byte for byte, what one process writes:
no row lost, doubled or torn. Then the next store begins, until there were enough kills.

With a launcher the command that users give fills the store, with the gradients of the embedded
model: `torchrun -m dataflex gradstore build`, of two or three ranks that torchrun starts again up
to twice, or `dataflex-cli gradstore build --engine ray`, of two actors. A kill ends one rank or one
actor, or now and then the command itself, whose ranks go on for a moment. Where the command has
failed of it, it is given again, until it ends by itself.

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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

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

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"

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
#: Part of the kills under a launcher that end the whole command, and the longest wait before a
#: kill: so many times as long as one process takes for the whole store.
WHOLE, LONGEST_BUILD = 0.2, 2.0

#: What a worker, in a folder or behind a service, and in a bucket, would take longer to import than
#: it lives.
IMPORTED = (("httpx", "httpcore", "pandas", "pyarrow.parquet"),
            ("obstore.store", "pandas", "pyarrow.parquet"))  # fmt: skip
#: Exit code of a look at a store, where it is well: this and the number of its generations.
WELL = 10


def build(place: str, worker: Worker | None) -> None:
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
                time.sleep(PAUSE)
                generation.write_unit(
                    unit.index, features[unit.start : unit.stop], np.ones(k, np.float32),
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
        assert np.isfinite(generation.read(0, generation.rows)).all(), generation.name
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


# ---- launchers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launcher:
    """`gradstore build` of the embedded model, by a launcher.

    Attributes:
        name: torchrun or ray.
        folder: where it works.
    """

    name: str
    folder: Path

    #: Exit codes of a command that a kill has ended.
    codes = {"torchrun": (1, -signal.SIGKILL), "ray": (5, -signal.SIGKILL)}  # noqa: RUF012
    #: The pattern in its command by which a process that computes, or loads for it, is known.
    words = {"torchrun": "-m dataflex gradstore build", "ray": "ray::(FeatureActor|worker )"}  # noqa: RUF012

    def configure(self) -> None:
        """Write the configuration: 1,600 rows are seven units, and two target sets one each."""
        settings = {
            "model_name_or_path": str(TINY / "model"), "template": "default", "stage": "sft",
            "dataset": "tiny_train", "target_dataset": "tiny_target_sort,tiny_target_date",
            "dataset_dir": str(TINY / "data"), "cutoff_len": 64, "do_train": True,
            "finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,down_proj",
            "output_dir": str(self.folder / "run"), "overwrite_cache": True, "report_to": "none",
            "train_type": "dynamic_select", "component_name": "less",
            "component_params": {"proj_dim": 64, "gradient_type": "sgd"},
        }  # fmt: skip
        (self.folder / "run.json").write_text(json.dumps(settings))

    def alone(self, place: str) -> float:
        """Fill a store by one process; return its seconds."""
        began = time.monotonic()
        with self.running(place, []) as command:
            if code := command.process.wait():
                raise SystemExit(f"a single process: exit code {code}: {command.errors()}")
        return time.monotonic() - began

    @contextmanager
    def started(self, place: str, draw: random.Random) -> Iterator[Running]:
        """Start the command, some way; see `running`."""
        if self.name == "ray":
            options = ["--engine", "ray", "--actors", "2"]
            with self.running(place, [], options) as command:
                yield command
            return
        ranks = [f"--nproc-per-node={draw.randint(2, 3)}", f"--max-restarts={draw.randint(0, 2)}"]
        with self.running(
            place, ["-m", "torch.distributed.run", "--standalone", *ranks]
        ) as command:
            yield command

    @contextmanager
    def running(
        self, place: str, before: Sequence[str], behind: Sequence[str] = ()
    ) -> Iterator[Running]:
        """Run a command, which ends with the block, and all that it started with it."""
        build = ["-m", "dataflex", "gradstore", "build", f"{self.folder}/run.json"]
        argv = [sys.executable, *before, *build, f"gradstore={place}", *behind]
        # Ranks have one thread each, and bits depend on the number; Ray's folder is below TMPDIR.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "HF_DATASETS_CACHE": f"{self.folder}/data", "TMPDIR": str(self.folder)}  # fmt: skip
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                argv, cwd=self.folder, env=env, stdout=subprocess.DEVNULL, stderr=said, text=True
            )
            command = Running(process, said)
            try:
                yield command
            finally:
                command.end()


@dataclass(frozen=True)
class Running:
    """A command that runs.

    Attributes:
        process: its own.
        said: what it says on stderr.
        below: every process below it that was seen.
    """

    process: subprocess.Popen[str]
    said: IO[str]
    below: set[psutil.Process] = field(default_factory=set)

    def errors(self) -> str:
        """Return the end of what it has said."""
        self.said.seek(0)
        return self.said.read()[-3000:]

    def look(self) -> list[psutil.Process]:
        """List the processes below it that run; some may have outlived it."""
        for each in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            with suppress(psutil.NoSuchProcess):
                self.below.update(each.children(recursive=True))
        return [each for each in self.below if each.is_running()]

    def computing(self, words: str) -> list[psutil.Process]:
        """List those that are known by a pattern in their command, in order of their numbers."""
        found = []
        for each in self.look():
            with suppress(psutil.NoSuchProcess):
                if re.search(words, " ".join(each.cmdline())):
                    found.append(each)
        return sorted(found, key=lambda each: each.pid)

    def end(self) -> None:
        """End it and everything below it."""
        self.look()
        self.process.kill()
        for each in list(self.below):
            with suppress(psutil.NoSuchProcess):
                self.below.update(each.children(recursive=True))
        left = [each for each in self.below if each.is_running()]
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, timeout=10)
        self.process.wait()


def killed_under(launcher: Launcher, place: str, longest: float, draw: random.Random) -> int:
    """Fill one store by a launcher's command while its processes are killed; return how many were.

    Args:
        launcher: of the command.
        place: of the store.
        longest: seconds between two kills at most.
        draw: of all that is left to chance.
    """
    kills, code = 0, -1
    while code:
        with launcher.started(place, draw) as command:
            process, killed = command.process, False
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0, longest))
                victims = command.computing(launcher.words[launcher.name])
                whole = draw.random() < WHOLE
                if process.poll() is not None or not (whole or victims):
                    continue
                with suppress(psutil.NoSuchProcess):
                    (process if whole else draw.choice(victims)).kill()
                    kills, killed = kills + 1, True
                must(lambda: WELL + look(place), f"a look at {place}")
            code = process.wait()
            if code and not (killed and code in launcher.codes[launcher.name]):
                raise SystemExit(
                    f"{launcher.name} of {place}: exit code {code}: {command.errors()}"
                )
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
    options = parser.parse_args()
    if options.kills <= 0 and options.minutes <= 0:
        parser.error("nothing to do: give --kills or --minutes")
    began, draw = time.monotonic(), random.Random(options.seed)
    folder = tempfile.mkdtemp(prefix="stress-")
    top, alone = options.place or folder, f"{folder}/alone"
    os.environ.setdefault("GRADSTORE_TOKEN", "a-key-of-the-stress-to-read")
    os.environ.setdefault("GRADSTORE_WRITE_TOKEN", "a-key-of-the-stress-to-write")
    for module in IMPORTED[top.partition(":")[0] == "s3"]:
        importlib.import_module(module)
    launcher, longest = Launcher(options.launcher or "", Path(folder)), 0.0
    if launcher.name:
        launcher.configure()
        longest = LONGEST_BUILD * launcher.alone(alone)
    else:
        must(lambda: build(alone, None), "a single process")
    kills = stores = 0
    while kills < options.kills or time.monotonic() - began < 60 * options.minutes:
        where = f"{top}/{os.getpid()}-{stores}"
        with served(where) if options.service else nullcontext(where) as place:
            if launcher.name:
                kills += killed_under(launcher, place, longest, draw)
            else:
                kills += killed_until_done(place, draw)
                must(lambda: build(place, None), f"a last process at {place}")
            must(lambda: WELL + look(place), f"a last look at {place}")
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
