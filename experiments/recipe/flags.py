"""Flags of the recipe: one for each field of `RecipeSettings`, with its default and what it means. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.recipe.config import MIX, TRAIN_SAMPLES, VAL_SAMPLES, RecipeSettings
from kvcore.flags import FlagSet

DESCRIPTION = "Train a student on the keys and values of one or several teachers. Booleans are true or false."

EXAMPLES = """examples:
  Two teachers, fixed weights; starts a server for each teacher on this machine:
    python experiments/train_multi_teacher_kv.py --student_model Qwen/Qwen2.5-1.5B \\
        --teacher_models Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B --fusion_strategy fixed --fixed_weights 0.5,0.5 \\
        --output_dir outputs/two_teachers
  All three stages of a scenario, under 8 ranks, with servers that run elsewhere:
    torchrun --standalone --nproc_per_node 8 experiments/train_multi_teacher_kv.py \\
        --config configs/experiments/one_family_qwen.yaml \\
        --teacher_endpoints Qwen2.5-7B=node1:50051 Qwen2.5-14B=node2:50051
  Teachers in 8 bits:
    python experiments/train_multi_teacher_kv.py --config configs/experiments/one_family_llama.yaml \\
        --load_in_8bit true --bnb_4bit_compute_dtype bfloat16
  Datasets on local disks, and only made ready:
    python experiments/train_multi_teacher_kv.py --config configs/experiments/one_family_qwen.yaml \\
        --data_dir copies --prepare_only true
The same command after an interruption goes on from the newest checkpoint."""

# Headings of --help, in order; under each its fields and what to say about them.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "student": {
        "student_model_name_or_path": "directory or hub id, or the best_model of an earlier run",
        "student_mode": "latent: reasons in latents; token: reads and writes its reasoning as text",
        "num_latents": "latent positions, and how many tokens right and r-kv keep",
        "latent_passes": "Jacobi passes that refine the latents",
        "bf16": "the student's weights in bfloat16; false: float32",
        "gradient_checkpointing": "compute activations again in the backward pass",
    },
    "teachers": {
        "teacher_models": "directories or hub ids",
        "num_teachers": "use the first so many of --teacher_models; all by default",
        "teacher_endpoints": "NAME=HOST:PORT[,HOST:PORT] of servers that run, NAME the model's last part; @FILE with "
        "one a line. Without it a server for each model is started here, and ended afterwards",
        "teacher_device": "of servers started here: auto, cpu, cuda or cuda:N",
        "load_in_8bit": "servers started here read their weights in 8 bits (bitsandbytes, needs a GPU)",
        "load_in_4bit": "the same in 4 bits",
        "bnb_4bit_compute_dtype": "what quantised weights are computed in",
    },
    "data": {
        "dataset_name": f"{MIX} (the guide's mix), names of datasets, or a directory with train and val",
        "train_samples": f"training records; {TRAIN_SAMPLES} of datasets by default, and all of a directory",
        "val_samples": f"validation records; {VAL_SAMPLES} of datasets by default, and all of a directory",
        "use_extended_datasets": f"{MIX} has math, arc_challenge and hotpotqa too",
        "math23k_ratio": f"share of Chinese questions in {MIX}",
        "data_dir": "local copies of the datasets; $KVDISTILL_DATA_DIR by default, else the hub",
        "max_length": "longest sample in the student's tokens",
        "prepare_only": "write the data and end",
    },
    "fusion": {
        "train_phase": "stage of three-stage routing: 1 fixed, 2 similarity, 3 learnable; all: one after another, each "
        "from the best model of the one before, in folders of their own",
        "fusion_strategy": "how teachers are fused; fixed by default, or as --train_phase says",
        "fixed_weights": "one for each teacher, as 0.5,0.5 or 0.5 0.5; equal by default",
        "similarity_metric": "what similarity compares K/V by",
        "temperature": "of the softmax over teachers; 0.2 for similarity, 1.0 falling to 0.5 for learnable, by default",
        "router_type": "router of learnable",
        "router_hidden_dim": "its hidden size",
        "entropy_reg_weight": "how much it is rewarded for an even distribution",
    },
    "keys and values": {
        "kv_mode": "online: from the teachers; record: that, and write a store; offline: from the store alone",
        "kv_store": "directory of the store; OUTPUT_DIR/kv_store by default",
        "kv_compression": "tokens of the reasoning that leave a teacher: full (resampled to the latents), right, r-kv",
        "kv_loss_type": "distance between the student's K/V and the fused ones",
        "kv_loss_weight": "a number, or auto: as strong a gradient as the cross-entropy's",
        "layer_map_strategy": "which teacher layers a student layer learns from; learned starts from ratio, and trains "
        "in a learnable stage",
        "head_adapt_strategy": "how heads and dims are mapped; linear starts from ridge, trains in a learnable stage",
        "rope_scaling": "always true: keys are compared without their rotation, whatever the models' rope parameters",
        "calibration_samples": "samples that the maps are fitted on before the first step",
    },
    "optimisation": {
        "learning_rate": "peak, after warm-up",
        "warmup_ratio": "share of the steps",
        "max_grad_norm": "gradients are clipped at this norm",
        "per_device_train_batch_size": "samples at a time on each rank",
        "gradient_accumulation_steps": "a step takes batch size x this x ranks samples",
        "num_train_epochs": "passes over the training records",
        "max_steps": "optimiser steps, instead of epochs",
        "zero_stage": "how much DeepSpeed shares out among ranks",
        "seed": "of data order, latents and dropout",
    },
    "output": {
        "output_dir": "checkpoints, best_model, metrics, TensorBoard; on a disk that all ranks see",
        "eval_steps": "steps between validations; 0: only at the end",
        "save_steps": "steps between checkpoints; 0: only at the end",
        "logging_steps": "steps between lines of the log",
        "answer_tokens": "most tokens of an answer in validation",
        "metric_for_best_model": "what best_model is best by, on the validation records",
    },
}

FLAGS = FlagSet(
    RecipeSettings,
    DESCRIPTION,
    EXAMPLES,
    GROUPS,
    aliases={"student_model_name_or_path": ("--student_model",)},
    config_file=True,
)
parser, read_flags = FLAGS.parser, FLAGS.read
