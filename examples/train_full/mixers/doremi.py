"""DoReMi's three runs: train a reference, find the domains' weights, train on their average.

    python examples/train_full/mixers/doremi.py [--out FOLDER] [key=value ...]

What follows the options is handed to all three runs of `dataflex-cli train`, as in
`doremi.py dataset=papers,code dataset_dir=data`. Settings of one run alone go into its YAML, and
`--step3 large.yaml` takes another one, for a larger model. A chain that has stopped goes on with
`--begin-at 2`; single runs resume by themselves where their YAML does not overwrite output_dir.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
CONFIGS = tuple(
    HERE / f"doremi_step{n}_{kind}.yaml"
    for n, kind in ((1, "static"), (2, "dynamic"), (3, "static"))
)

Train = Callable[[Path, Sequence[str]], None]


def train(config: Path, overrides: Sequence[str]) -> None:
    """One run; ends the script where it fails."""
    command = [str(Path(sys.executable).with_name("dataflex-cli")), "train", str(config)]
    code = subprocess.run([*command, *overrides], check=False).returncode
    if code:
        raise SystemExit(code)


def chain(
    configs: Sequence[Path], out: Path, shared: Sequence[str], begin_at: int = 1, run: Train = train
) -> list[float]:
    """All runs, from `begin_at` on.

    Args:
        configs: a YAML for each of the three runs.
        out: gets `1_reference`, `2_proxy` and `3_final`.
        shared: overrides for all runs.
        begin_at: the first run to make; those before it are in `out`.
        run: makes one.

    Returns:
        What run 3 was trained on: a share for each domain.
    """
    reference, proxy, final = (out / name for name in ("1_reference", "2_proxy", "3_final"))
    if begin_at <= 1:
        run(configs[0], [*shared, f"output_dir={reference}"])
    if begin_at <= 2:
        found = f"component_params.reference_model_path={reference}"
        run(configs[1], [*shared, f"output_dir={proxy}", found])
    result = json.loads((proxy / "doremi_average_weights.json").read_text(encoding="utf-8"))
    average: list[float] = result["average_weights"]
    run(configs[2], [*shared, f"output_dir={final}", f"init_mixture_proportions={average}"])
    return average


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/doremi"))
    parser.add_argument("--begin-at", type=int, choices=(1, 2, 3), default=1)
    for n, config in enumerate(CONFIGS, 1):
        parser.add_argument(f"--step{n}", type=Path, default=config)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    configs = (given.step1, given.step2, given.step3)
    average = chain(configs, given.out, given.overrides, given.begin_at)
    sys.stdout.write(f"trained on {', '.join(f'{share:.4f}' for share in average)}\n")


if __name__ == "__main__":
    main()
