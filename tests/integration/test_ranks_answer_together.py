"""Two ranks generate answers: with shared parameters they run the same passes, otherwise each stops when it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from student_trainer.model.generation import TextEnd, after_prompt, generate
from tests.support.tiny_models import build_model, build_tokenizer, tiny_spec

PROMPTS = ([7, 30, 41, 12, 9], [88, 5])
LIMIT = 12


def passes_and_tokens(end: TextEnd, prompt: list[int], *, together: bool) -> tuple[int, list[int]]:
    """How often the model ran, and the new tokens."""
    lm: Any = build_model(tiny_spec("qwen2", layers=2))
    passes: list[object] = []
    lm.register_forward_hook(lambda *_: passes.append(None))
    ids = torch.tensor([prompt])
    (row,) = generate(lm, after_prompt(ids, torch.ones_like(ids).bool()), LIMIT, end, together=together)
    return len(passes), row.ids


def one_rank(rank: int, directory: str, end_token: int) -> None:
    store = dist.FileStore(f"{directory}/store", 2)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    end = TextEnd(build_tokenizer("qwen2"), [end_token])
    found = [passes_and_tokens(end, PROMPTS[rank], together=together) for together in (True, False)]
    Path(directory, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def test_ranks_that_share_parameters_run_the_same_passes(tmp_path: Path) -> None:
    no_end = TextEnd(build_tokenizer("qwen2"), [])
    whole = [passes_and_tokens(no_end, prompt, together=False)[1] for prompt in PROMPTS]
    end_token = whole[0][7]
    lengths = [ids.index(end_token) if end_token in ids else LIMIT for ids in whole]
    assert lengths[0] != lengths[1]
    multiprocessing.spawn(one_rank, (str(tmp_path), end_token), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    needed = [min(LIMIT, length + 1) for length in lengths]
    for rank in range(2):
        together, alone = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert together == [max(needed), whole[rank][: lengths[rank]]]
        assert alone == [needed[rank], whole[rank][: lengths[rank]]]
