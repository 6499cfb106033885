# Sourced by the job scripts. What every job needs whoever starts it: the checkout, a Python, and where models are kept.
# shellcheck shell=bash

# default NAME VALUE: unless the variable is set, or CONFIG names a file of settings, which would be overridden.
default() {
    if [[ -z "${CONFIG:-}" && -z "${!1:-}" ]]; then
        printf -v "$1" '%s' "$2"
    fi
    export "${1?}"
}

if [[ ! -f experiments/train_multi_teacher_kv.py ]]; then
    echo "$PWD is no checkout of kvdistill: submit from the repository's root" >&2
    exit 2
fi
if [[ -z "${PYTHON:-}" ]]; then
    # sbatch --export=A=... passes no activated environment on.
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=$(command -v python3 || echo python3); fi
fi
if ! "$PYTHON" -c 'import pydantic, torch' 2>/dev/null; then
    echo "$PYTHON lacks kvdistill's packages: run make setup here, or set PYTHON" >&2
    exit 2
fi
# Where Hugging Face keeps models and datasets; on a disk that all nodes see.
export HF_HOME="${HF_HOME:-${HOME:-$PWD}/.cache/huggingface}"
export HF_DATASETS_CACHE="${HF_DATASETS_CACHE:-$HF_HOME/datasets}"
export HF_HUB_CACHE="${HF_HUB_CACHE:-${TRANSFORMERS_CACHE:-$HF_HOME/hub}}"
export TOKENIZERS_PARALLELISM=false
# Data that were made before are taken, unless the variables describe others.
described="${CONFIG:-}${DATASET:-}${USE_EXTENDED:-}${MATH23K_RATIO:-}${DATA_DIR:-}"
if [[ -z "$described" && -d data/prepared/train && -d data/prepared/val ]]; then
    export DATASET=./data/prepared
    echo "data: $DATASET is there and is used (DATASET names others)"
fi
