"""Other ways to train the same student on the same batches, with which `benchmarks.train_step` compares kvdistill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from data.collate import Collator, StudentBatch
from data.records import load_records
from kvcore.types import Tensor
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.student_loading import load_student
from student_trainer.model.capture import capture_kv
from student_trainer.model.lm_head import token_cross_entropy
from student_trainer.model.losses import mean_over_tokens

_IGNORED = -100


def train_plain(config: TrainConfig) -> None:
    """Supervised fine-tuning by transformers' Trainer with its defaults, on the CPU."""
    lm, tokenizer = load_student(config.student, config.run.seed)
    settings = TrainingArguments(
        output_dir=str(config.run.output_dir),
        per_device_train_batch_size=config.run.micro_batch,
        max_steps=config.run.steps or 1,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.max_grad_norm,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [row for batch in _batches(config, tokenizer) for row in _rows(batch)]
    Trainer(lm, settings, data_collator=_padded, train_dataset=_Rows(rows)).train()


def train_in_process(config: TrainConfig, teacher: str, layers: Sequence[int]) -> None:
    """The engine of kvdistill's trainer with the teacher in this process.

    Args:
        config: of the run.
        teacher: directory of the teacher.
        layers: its layers that are compared, one per student layer.
    """
    lm, tokenizer = load_student(config.student, config.run.seed)
    model = TeacherInside(lm, AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), layers)
    engine = ds_engine.Engine(model.train(), config, accumulation=1)
    for batch in _batches(config, tokenizer):
        engine.micro_step(batch)
    engine.close()


class TeacherInside(nn.Module):
    """Student and teacher in one process: cross-entropy, and smooth-L1 of regressed K/V in units of their deviation."""

    def __init__(self, student: Any, teacher: Any, layers: Sequence[int]) -> None:
        super().__init__()
        # In a list, so that it is neither trained nor saved.
        self.student, self._teacher, self._layers = student, [teacher.eval()], list(layers)
        own, taught = _features(student.config), _features(teacher.config)
        self.regressors = nn.ModuleList(nn.Linear(own, taught) for _ in range(2 * len(layers)))

    def forward(self, batch: StudentBatch) -> dict[str, Tensor]:
        """The losses. The teacher's pass is the first one."""
        (teacher,) = self._teacher
        ids_BT, mask_BT = batch.text_ids_BT, batch.text_mask_BT
        with torch.no_grad(), capture_kv(teacher) as taught:
            teacher.base_model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        with capture_kv(self.student) as own:
            output = self.student.base_model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        target_BT = batch.text_target_BT[:, 1:]
        states_BTE = output.last_hidden_state[:, :-1]
        loss_BT = token_cross_entropy(self.student, states_BTE, ids_BT[:, 1:], target_BT)
        pairs = [
            (own_BHTD, taught_BHTD[layer])
            for own_LBHTD, taught_BHTD in ((own.k_BHTD, taught.k_BHTD), (own.v_BHTD, taught.v_BHTD))
            for layer, own_BHTD in zip(self._layers, own_LBHTD, strict=True)
        ]
        distances = [
            _distance(regressor(_features_of(own_BHTD, mask_BT)), _features_of(target_BHTD, mask_BT))
            for regressor, (own_BHTD, target_BHTD) in zip(self.regressors, pairs, strict=True)
        ]
        return {"loss": mean_over_tokens(loss_BT, target_BT) + torch.stack(distances).mean()}


def _distance(view_NF: Tensor, target_NF: Tensor) -> Tensor:
    deviation = target_NF.std()
    return smooth_l1_loss(view_NF / deviation, target_NF / deviation)


def _features(config: Any) -> int:
    return int(config.num_key_value_heads * config.head_dim)


def _features_of(x_BHTD: Tensor, mask_BT: Tensor) -> Tensor:
    return x_BHTD.transpose(1, 2).flatten(2)[mask_BT]


def _batches(config: TrainConfig, tokenizer: Any) -> Iterator[StudentBatch]:
    """The micro-batches of kvdistill's trainer on one rank."""
    collator, records = Collator(tokenizer, config.data.max_tokens), load_records(config.data.train)
    order = SampleOrder(config.run, len(records), 0, 1)
    order.sort_by(collator.count(records).sum(axis=1))
    for indices in order.micro_batches(0):
        yield collator([records[index] for index in indices])


def _rows(batch: StudentBatch) -> Iterator[dict[str, Tensor]]:
    """The texts of a batch one by one. The prompt has no loss."""
    labels_BT = batch.text_ids_BT.masked_fill(~batch.text_target_BT, _IGNORED)
    for ids_T, labels_T, mask_T in zip(batch.text_ids_BT, labels_BT, batch.text_mask_BT, strict=True):
        ids, labels = ids_T[mask_T], labels_T[mask_T]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: Sequence[dict[str, Tensor]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def _padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": _IGNORED}
    return {name: pad_sequence([row[name] for row in rows], True, value) for name, value in fill.items()}
