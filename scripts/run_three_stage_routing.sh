#!/usr/bin/env bash
#SBATCH --job-name=three_stage_routing
#SBATCH --nodes=3
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
# Trains in three stages of fusion: fixed weights, similarity weights, and a learned router. Each stage starts from the
# best model of the previous one. Outputs: OUTPUT_DIR/{stage1_fixed,stage2_similarity,stage3_learnable}.
#
#   sbatch scripts/run_three_stage_routing.sh
#   sbatch --job-name="qwen_dual" \
#       --export=STUDENT="Qwen/Qwen2.5-1.5B",TEACHERS="Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B" scripts/run_three_stage_routing.sh
#   sbatch --nodes=4 --export=ALL,CONFIG=configs/experiments/three_teachers_qwen.yaml scripts/run_three_stage_routing.sh
#   STUDENT=models/small TEACHERS="models/a models/b" scripts/run_three_stage_routing.sh --local
#
# Each teacher runs on its own node if there are enough nodes (one more than teachers); the ranks use the other nodes.
# Every variable below can be set in the environment; docs/deploy.md lists the others. A comma ends a value inside --export,
# so separate weights by spaces there. Ten minutes before its time limit the job saves a checkpoint and requeues itself.
# A requeued job continues from its checkpoint, also after scontrol requeue.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source scripts/job_environment.sh

default STUDENT "Qwen/Qwen2.5-1.5B"
default TEACHERS "${TEACHER_MODELS:-Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B}"
default NUM_TEACHERS ""             # the first N of TEACHERS; all by default
default OUTPUT_DIR "./outputs/three_stage_routing"

default FUSION_STRATEGY ""          # run only this stage: fixed, similarity or learnable; all three by default
default FIXED_WEIGHTS ""            # such as "0.5,0.5"; equal by default
default SIMILARITY_METRIC "cosine"  # cosine, dot, euclidean
default TEMPERATURE ""              # of similarity or router; the default depends on them
default ROUTER_TYPE "mlp"           # mlp, gate, attention
default ROUTER_HIDDEN_DIM "256"
default ENTROPY_REG_WEIGHT "0.01"

default KV_COMPRESSION "right"      # full, right, r-kv
default KV_LOSS_WEIGHT "auto"
default BATCH_SIZE "2"              # per rank
default GRAD_ACCUM "16"
default LEARNING_RATE "2e-5"
default WARMUP_RATIO "0.1"
default GRADIENT_CHECKPOINTING "true"
default USE_BF16 "true"

case "${CONFIG:+file}${FUSION_STRATEGY:-}" in
    "") export TRAIN_PHASE="${TRAIN_PHASE:-all}" ;;
    fixed) OUTPUT_DIR="$OUTPUT_DIR/stage1_fixed" ;;
    similarity) OUTPUT_DIR="$OUTPUT_DIR/stage2_similarity" ;;
    learnable) OUTPUT_DIR="$OUTPUT_DIR/stage3_learnable" ;;
esac

exec "$PYTHON" -m experiments.recipe.job "$@"
