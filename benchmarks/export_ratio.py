"""Export time over plain training time, same rows, same process: what a selection costs.

    uv run python benchmarks/export_ratio.py            # after examples/real/prepare.py
    uv run python benchmarks/export_ratio.py --finetuning full --rows 24
    uv run python benchmarks/export_ratio.py --shape llama-8b --device cuda --token-budget 8192

SmolLM2-135M with LoRA r=16 on all linear layers, or with all its weights trained, and the real
example's rows. *Plain* is one batched forward and backward with these trainable, eval mode, the
model's own loss and no optimizer step. *Export* is everything that a selection does with the same
rows: per-row gradients (of whole weights, those that `--modules` names), adam_marginal features,
projection to d=4096, units in a store, commit. Passes alternate A B A B after a warm-up; a ratio is
the median over the pairs, `limit` what it was to be at most: most are above it (docs/figures.md).
Prints one table and appends to results/export_ratio.csv. Whole weights
are projected by sjlt alone: a dense projection of so many is dozens of times the pass.

`--shape llama-8b` is Llama-3.1-8B's shape in bfloat16 with random weights, and rows of 512 random
tokens with labels on the second half; `--layers` cuts it where memory does not hold it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from gradkernels import ProjectionSpec
from report import RESULTS, Took, append, compared, echo, machine, timed
from tables import EXPORT_AIMS

from gradstore.capture.chosen import Modules
from gradstore.capture.per_sample import GradientCapture
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batches, plan_batches
from gradstore.format.records import GenerationRecord, RowSet, row_hash
from gradstore.store.filling import fill
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
REAL = HERE.parent / "examples" / "real"
Method = Literal["sjlt", "rademacher"]
Pairs = dict[Method, list[tuple[Took, Took]]]
Trained = Literal["lora", "full"]
METHODS: dict[Trained, tuple[Method, ...]] = {"lora": ("sjlt", "rademacher"), "full": ("sjlt",)}
LARGE_LIMITS: dict[Method, float] = {"sjlt": 1.02, "rademacher": 1.06}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEAKERS = {
    "human": "user",
    "observation": "user",
    "gpt": "assistant",
    "function_call": "assistant",
}
IGNORED = -100
SHAPES = ("smollm2", "llama-8b")
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LLAMA_8B_LAYERS = 32
LONG = 512

Row = dict[str, list[int]]


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(speaker, text) pairs of an alpaca or a tool-calling row."""
    if "conversations" in row:
        turns = [(SPEAKERS[turn["from"]], turn["value"]) for turn in row["conversations"]]
        return [("system", "You can call these tools: " + row["tools"]), *turns]
    question = "\n".join(filter(None, (row["instruction"], row["input"])))
    return [("user", question), ("assistant", row["output"])]


def load_rows(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Row]:
    """`count` rows of the real pool, every kind in its share; labels on the assistant's words."""
    pools = [
        json.loads((REAL / "data" / f"real_{kind}.json").read_text(encoding="utf-8"))
        for kind in ("alpaca", "glaive", "identity")
    ]
    total = sum(map(len, pools))
    texts = [row for pool in pools for row in pool[: round(count * len(pool) / total)]]
    rows: list[Row] = []
    for text in texts:
        row: Row = {"input_ids": [], "labels": []}
        for speaker, said in turns_of(text):
            head = tokenizer(f"<|im_start|>{speaker}\n")["input_ids"]
            body = tokenizer(f"{said}<|im_end|>\n")["input_ids"]
            row["input_ids"] += head + body
            wanted = body if speaker == "assistant" else [IGNORED] * len(body)
            row["labels"] += [IGNORED] * len(head) + wanted
        rows.append({key: ids[:512] for key, ids in row.items()})
    return rows


def real_rows(count: int) -> list[Row]:
    """Load `count` rows of the real pool with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    return load_rows(AutoTokenizer.from_pretrained(str(REAL / "model")), count)


def random_rows(count: int) -> list[Row]:
    """Draw rows of LONG tokens of Llama's vocabulary; labels on the second half."""
    draw = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for _ in range(count):
        ids = torch.randint(LLAMA_8B["vocab_size"], (LONG,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (LONG // 2) + ids[LONG // 2 :]})
    return rows


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Right-pads rows to one batch (b, t)."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 2),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


@dataclass
class Bench:
    """Model, rows and batches that both sides share."""

    model: torch.nn.Module
    rows: list[Row]
    token_budget: int
    device: torch.device
    trained: Trained = "lora"
    modules: Modules = "linear"
    moments: AdamMoments | None = None

    def train_a_little(self) -> None:
        """Two optimizer steps: adapter and Adam moments are then as in a real run, not zero."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=2e-4)
        for start in (0, 2):
            batch = collate(self.rows[start : start + 2])
            moved = {key: tensor.to(self.device) for key, tensor in batch.items()}
            self.model(**moved, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.moments = AdamMoments.from_optimizer(optimizer, self.model)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """List the batches of one pass, the same ones that the export plans."""
        lengths = [len(row["input_ids"]) for row in self.rows]
        for positions in plan_batches(lengths, self.token_budget):
            batch = collate([self.rows[int(i)] for i in positions])
            yield {key: tensor.to(self.device) for key, tensor in batch.items()}

    def synchronize(self) -> None:
        """Wait for the device, so that the clock sees finished work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def plain(self) -> Took:
        """Time one pass of forward and backward."""

        def one_pass() -> None:
            for batch in self.batches():
                self.model(**batch, use_cache=False).loss.backward()
                self.model.zero_grad(set_to_none=True)

        self.model.eval()
        return timed(one_pass, self.synchronize)

    def export(self, method: Method, dim: int) -> Took:
        """Time one export into a new store, plan and commit included."""
        with tempfile.TemporaryDirectory(prefix="export-ratio-") as folder:

            def into_a_store() -> None:
                path = Path(folder) / "store"
                with StoreWriter(path, provenance={"benchmark": method}) as writer:
                    self._write(writer, method, dim)

            return timed(into_a_store, self.synchronize)

    def _write(self, writer: StoreWriter, method: Method, dim: int) -> None:
        projection = ProjectionSpec(method=method, p=self.p, d=dim, seed=1)
        record = GenerationRecord(
            name="train/2",
            role="train",
            step=2,
            run_id="export_ratio",
            adapter_hash="benchmark",
            effective_seed=projection.seed,
            projection=projection.to_dict(),
            feature="adam_marginal",
        )
        hashes = [row_hash(row["input_ids"], row["labels"]) for row in self.rows]
        generation = writer.begin(record, RowSet.from_hashes(hashes), dim=dim)
        lengths = [len(row["input_ids"]) for row in self.rows]
        batches = Batches(self.rows, collate, lengths, self.token_budget)
        spec = FeatureSpec("adam_marginal", modules=self.modules)
        recipe = Recipe(spec, projection, self.moments)
        summary = fill(generation, partial(compute_unit, self.model, batches, recipe))
        generation.commit()
        if summary.status_counts != {"ok": len(self.rows)}:
            sys.exit(f"not every row gave a feature: {summary.status_counts}")

    @cached_property
    def p(self) -> int:
        """Gradient length: the parameters whose gradients are taken."""
        return GradientCapture(self.model, self.modules).p


def trained_model(
    device: torch.device,
    trained: Trained = "lora",
    *,
    random_weights: bool = False,
    layers: int | None = None,
) -> torch.nn.Module:
    """Make a model with LoRA r=16 on all linear layers, or with all weights trained.

    Args:
        device: where it is.
        trained: lora | full.
        random_weights: of SmolLM2-135M's shape, in place of its weights; float32 either way.
        layers: of Llama-3.1-8B's shape in bfloat16, random weights; None for SmolLM2-135M.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    folder = str(REAL / "model")
    if layers is not None:
        settings = LlamaConfig(**LLAMA_8B, num_hidden_layers=layers, dtype="bfloat16")
        with device:  # weights are drawn where they stay
            base = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call]
    elif random_weights:
        settings = AutoConfig.from_pretrained(folder)
        base = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call]
        base = base.to(torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if trained == "full":
        whole: torch.nn.Module = base.to(device)
        return whole
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM")
    model: torch.nn.Module = get_peft_model(base, config)
    return model.to(device)


def measure(bench: Bench, dim: int, pairs: int) -> Pairs:
    """(plain, export) seconds of each projection: A B A B, after one pass of every kind."""
    echo(f"warm-up: {bench.plain().wall:.1f} s plain")
    for method in METHODS[bench.trained]:
        echo(f"warm-up: {bench.export(method, dim).wall:.1f} s {method}")
    found: Pairs = {method: [] for method in METHODS[bench.trained]}
    for number in range(1, pairs + 1):
        for method, results in found.items():
            results.append((bench.plain(), bench.export(method, dim)))
            plain, export = results[-1]
            echo(
                f"pair {number} of {pairs}: plain {plain.wall:.1f} s, {method} {export.wall:.1f} s"
            )
    return found


def lines_of(bench: Bench, found: Pairs, dim: int) -> list[dict[str, Any]]:
    """One line per projection: medians, ratio and its spread, what it was to be at most."""
    chip = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None
    n, tokens = len(bench.rows), sum(len(row["input_ids"]) for row in bench.rows)
    return [
        machine(chip=chip)
        | {
            "rows": n,
            "tokens": tokens,
            "token_budget": bench.token_budget,
            "finetuning": bench.trained,
            "modules": bench.modules if bench.trained == "full" else "",
            "p": bench.p,
            "projection": method,
            "d": dim,
            **compared([e for _, e in pairs], [p for p, _ in pairs], ("export", "plain")),
            "limit": EXPORT_AIMS[bench.trained, method],
        }
        for method, pairs in found.items()
    ]


def large_lines(bench: Bench, dim: int, pairs: int, layers: int) -> list[dict[str, Any]]:
    """Measure a model of Llama-3.1-8B's shape, cut to so many layers.

    A base in bfloat16 has its adapter in float32, as in LlamaFactory: both passes cast.
    """
    with torch.autocast(bench.device.type, torch.bfloat16):
        bench.train_a_little()
        found = measure(bench, dim, pairs)
    shape = f"llama-8b, {layers} layers"
    return [line | {"shape": shape, "limit": LARGE_LIMITS[line["projection"]]}
            for line in lines_of(bench, found, dim)]  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="at most 200, the pool")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--finetuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--modules", choices=("linear", "all"), default="linear")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--layers", type=int, default=LLAMA_8B_LAYERS, help="of llama-8b")
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens of a padded batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--random-weights", action="store_true", help="config alone: times do not depend on values"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        default=RESULTS / "export_ratio.csv",
        help="where the figures are appended",
    )
    options = parser.parse_args()
    large = options.shape == "llama-8b"
    if not large and not (REAL / "model" / "config.json").is_file():
        sys.exit("no examples/real/model: run `uv run python examples/real/prepare.py` first")

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    bench = Bench(
        trained_model(
            device,
            options.finetuning,
            random_weights=options.random_weights,
            layers=options.layers if large else None,
        ),
        random_rows(options.rows) if large else real_rows(options.rows),
        options.token_budget,
        device,
        options.finetuning,
        options.modules,
    )
    if large:
        results = large_lines(bench, options.dim, options.pairs, options.layers)
    else:
        bench.train_a_little()
        results = lines_of(bench, measure(bench, options.dim, options.pairs), options.dim)
    append(options.csv, results)
    first = results[0]
    echo(f"\n{first['chip'] or first['cpu']}; {first['rows']} rows, {first['tokens']} tokens")
    echo(f"{'projection':<12}{'plain s':>10}{'export s':>10}{'ratio':>8}{'spread':>14}{'aimed':>8}")
    for row in results:
        echo(
            f"{row['projection']:<12}{row['plain_s']:>10.1f}{row['export_s']:>10.1f}"
            f"{row['ratio']:>8.3f}{row['ratio_min']:>8.2f}-{row['ratio_max']:.2f}"
            f"{row['limit']:>9.2f}"
        )


if __name__ == "__main__":
    main()
