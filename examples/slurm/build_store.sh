#!/bin/bash
# Build a store by a job array: each task is one worker, and a task that is lost is replaced by the
# others. Submit again, with any --array, to go on where all of them stopped.
#
#     sbatch --array=1-8 examples/slurm/build_store.sh CONFIG.yaml [key=value ...]
#
# CONFIG, its model, data, checkpoints and the store lie on a file system that every node sees.
#SBATCH --job-name=gradstore
#SBATCH --array=1-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --output=gradstore-%A-%a.log

set -euo pipefail

# Tasks are numbered from SLURM_ARRAY_TASK_MIN, which need not be 1.
number=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
if ((number > SLURM_ARRAY_TASK_COUNT)); then # numbers of the array that leave some out
    number=$SLURM_ARRAY_TASK_COUNT
fi

exec dataflex-cli gradstore build "$@" --worker "$number/$SLURM_ARRAY_TASK_COUNT"
