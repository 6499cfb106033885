#!/usr/bin/env bash
# Trains Qwen2.5-0.5B with the presets of the papers and evaluates it on GSM8K, in slices of SLICE seconds.
#
# A call prepares the data once, then continues the first run that is not finished. At the end of its slice the run
# saves a checkpoint, and the call exits with 75. When all runs are finished and evaluated, it prints the accuracies and
# exits with 0. Needs a GPU with 24 GB or more, the hub, and `pip install -e .[gpu,eval]`.
#
#   until experiments/paper/run.sh; do [ $? -eq 75 ] || break; done
#
# METHODS, SEEDS, OUTPUT, DATA, MODEL, DEVICE, LIMIT (of questions) and OPTIONS (more `--set KEY=VALUE`) change what it
# does. `experiments/paper/run.sh --show` prints the commands of all runs and runs none.
set -euo pipefail
cd "$(dirname "$0")/../.."

METHODS="${METHODS:-kava codi pccot lotus}"
SEEDS="${SEEDS:-0 1 2}"
SLICE="${SLICE:-480}"
OUTPUT="${OUTPUT:-outputs/papers}"
DATA="${DATA:-data/gsm8k_aug}"
MODEL="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}"
DEVICE="${DEVICE:-cuda}"
LIMIT="${LIMIT:-}"
OPTIONS="${OPTIONS:-}"
PYTHON="${PYTHON:-python}"
# What a call returns if runs are left, as EX_TEMPFAIL of sysexits.h.
LEFT=75
SHOW=""
[ "${1:-}" = --show ] && SHOW=1
deadline=$((SECONDS + SLICE))

# Runs a command, or shows it.
run() {
    if [ -n "$SHOW" ]; then
        echo "$*"
    else
        "$@"
    fi
}

# Trains one run for what is left of the slice: train_run NAME METHOD SEED [--set KEY=VALUE]...
train_run() {
    local name="$1" method="$2" seed="$3" status=0
    shift 3
    [ -f "$OUTPUT/$name/summary.json" ] && return
    local left=$((deadline - SECONDS))
    [ "$left" -gt 0 ] || exit "$LEFT"
    # shellcheck disable=SC2086 # OPTIONS has several words.
    run timeout --signal=TERM --kill-after=120 "$left" "$PYTHON" -m kvdistill train \
        --config "configs/papers/${method}_qwen0.5b_aug.yaml" --set "data.train=$DATA/train" --set "data.val=$DATA/val" \
        --set "run.output_dir=$OUTPUT/$name" --set "run.seed=$seed" "$@" $OPTIONS || status=$?
    [ "$status" -eq 124 ] && exit "$LEFT"
    return "$status"
}

# Evaluates one run: evaluate_run NAME
evaluate_run() {
    # Training writes this file, too, with the score of its validation.
    grep -qs '"gsm8k_test"' "$OUTPUT/$1/eval_results.json" && return
    # shellcheck disable=SC2086 # Without a limit there is no flag.
    run "$PYTHON" -m kvdistill eval --model-path "$OUTPUT/$1/best_model" --eval-datasets gsm8k_test --device "$DEVICE" \
        ${LIMIT:+--limit $LIMIT}
}

if [ ! -d "$DATA/train" ]; then
    run "$PYTHON" -m data.multi_task_dataset --output "$DATA" --base gsm8k_aug --no-extended --math23k-ratio 0 \
        --style cot --train-samples 385000 --val-samples 500 --allow-fewer
fi
for seed in $SEEDS; do
    for method in $METHODS; do
        name="${method}_qwen0.5b_aug-seed$seed"
        start=(--set "student.path=$MODEL")
        if [ "$method" = lotus ]; then
            # It starts from a student that was trained on written reasoning.
            train_run "${name}_written" lotus "$seed" "${start[@]}" --set student.mode=token \
                --set student.projection=true --set student.latents_per_step=null --set loss.step_ce_weight=0 \
                --set run.curriculum_epochs=null --set run.epochs=10
            start=(--set "student.path=$OUTPUT/${name}_written/best_model")
        fi
        train_run "$name" "$method" "$seed" "${start[@]}"
        evaluate_run "$name"
    done
done
[ -n "$SHOW" ] || "$PYTHON" -m kvdistill report "$OUTPUT"
