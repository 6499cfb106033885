#!/usr/bin/env bash
#SBATCH --job-name=large_scale_multi_teacher
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=72:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#
# Trains one student with several large teachers and one fusion strategy.
#
#   sbatch scripts/run_large_scale_multi_teacher.sh
#   FUSION_STRATEGY=learnable sbatch scripts/run_large_scale_multi_teacher.sh
#   sbatch --nodes=3 --export=ALL,TEACHER_MODELS="Qwen/Qwen2.5-7B meta-llama/Llama-3.1-8B" scripts/run_large_scale_multi_teacher.sh
#   STUDENT=models/small TEACHER_MODELS="models/a models/b" scripts/run_large_scale_multi_teacher.sh --local
#
# Nodes, variables, requeueing: see scripts/run_three_stage_routing.sh and docs/deploy.md.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source scripts/job_environment.sh

default STUDENT "Qwen/Qwen2.5-1.5B"
if [[ -z "${TEACHER_MODELS:-}${TEACHERS:-}" ]]; then
    default TEACHER_MODELS "Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B Qwen/Qwen2.5-32B"
    default NUM_TEACHERS "3"                # the first N teachers
    if [[ "${NUM_TEACHERS:-}" == 3 ]]; then
        default FIXED_WEIGHTS "0.33,0.33,0.34"
    fi
fi
default NUM_TEACHERS ""                     # all teachers
default FIXED_WEIGHTS ""                    # equal weights
default OUTPUT_DIR "./outputs/large_scale_multi_teacher"

default FUSION_STRATEGY "fixed"             # fixed, similarity, learnable
default SIMILARITY_METRIC "cosine"          # cosine, dot, euclidean
default TEMPERATURE ""                      # of similarity or router; the default depends on them
default ROUTER_TYPE "mlp"                   # mlp, gate, attention
default ROUTER_HIDDEN_DIM "256"
default ENTROPY_REG_WEIGHT "0.01"

default KV_COMPRESSION "right"              # full, right, r-kv
default KV_LOSS_WEIGHT "auto"
default BATCH_SIZE "2"                      # per rank
default GRAD_ACCUM "16"
default LEARNING_RATE "2e-5"
default WARMUP_RATIO "0.1"
default GRADIENT_CHECKPOINTING "true"
default USE_BF16 "true"

exec "$PYTHON" -m experiments.recipe.job "$@"
