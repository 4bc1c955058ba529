#!/usr/bin/env bash
# LESS's recipe (arXiv 2402.04333, sections 3 and 4) on the embedded model, in four commands and some minutes.
#
#     uv run bash examples/offline/less.sh
#
# 1. Warm up on a twentieth of the rows for four epochs, a checkpoint after each.
# 2. Store the Adam gradient features of all rows, and the gradients of two target sets, at the four checkpoints.
# 3. Select the 5% with the highest influence: cosines weighted by the checkpoints' learning rates, mean within a
#    target set, maximum over the sets.
# 4. Train from the base model on the selected rows.
#
# Interrupted or run again: a warm-up that has ended is kept, step 2 computes only what its store lacks, and steps 3 and
# 4 take the place of what they made before. To begin anew, remove the folder. RUNS=FOLDER names another.
#
# Projections are sparse (sjlt) where LESS's are dense; proj_method: rademacher in features.yaml takes those.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/offline runs=${RUNS:-runs/offline}

if [ ! -f "$runs/warmup/train_results.json" ]; then
  llamafactory-cli train "$here/plain.yaml" output_dir="$runs/warmup" max_samples=80
fi
dataflex-cli gradstore build "$here/features.yaml" output_dir="$runs/warmup"
rm -rf "$runs/selected"
dataflex-cli gradstore select "$runs/warmup/gradstore" --checkpoints all -k 80 --as-dataset "$runs/selected"
llamafactory-cli train "$here/plain.yaml" output_dir="$runs/selected-run" \
  dataset_dir="$runs/selected"
