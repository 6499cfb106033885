# Sourced by the job scripts. Checks the checkout and Python, and sets the folders of models and data.
# shellcheck shell=bash

# default NAME VALUE: sets and exports a variable that is empty. With CONFIG it only exports, since the file has the settings.
default() {
    if [[ -z "${CONFIG:-}" && -z "${!1:-}" ]]; then
        printf -v "$1" '%s' "$2"
    fi
    export "${1?}"
}

if [[ ! -f experiments/train_multi_teacher_kv.py ]]; then
    echo "$PWD is not a checkout of kvdistill: submit from the root of the repository" >&2
    exit 2
fi
if [[ -z "${PYTHON:-}" ]]; then
    # Under sbatch --export=A=... the job does not inherit an activated environment.
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=$(command -v python3 || echo python3); fi
fi
if ! "$PYTHON" -c 'import pydantic, torch' 2>/dev/null; then
    echo "$PYTHON lacks kvdistill's packages: run make setup here, or set PYTHON" >&2
    exit 2
fi
# The Hugging Face caches, on a disk that all nodes see.
export HF_HOME="${HF_HOME:-${HOME:-$PWD}/.cache/huggingface}"
export HF_DATASETS_CACHE="${HF_DATASETS_CACHE:-$HF_HOME/datasets}"
export HF_HUB_CACHE="${HF_HUB_CACHE:-${TRANSFORMERS_CACHE:-$HF_HOME/hub}}"
export TOKENIZERS_PARALLELISM=false
# Use data/prepared if it exists and no variable selects other data.
selected="${CONFIG:-}${DATASET:-}${USE_EXTENDED:-}${MATH23K_RATIO:-}${DATA_DIR:-}"
if [[ -z "$selected" && -d data/prepared/train && -d data/prepared/val ]]; then
    export DATASET=./data/prepared
    echo "data: using $DATASET (set DATASET for other data)"
fi
