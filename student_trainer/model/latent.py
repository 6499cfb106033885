"""A student that reasons in latents instead of text (PCCoT, arXiv 2506.18582; KaVa, arXiv 2510.02312).

The sequence is prompt, M latents, answer. Each Jacobi pass replaces the input of latent i by a projection of the last
hidden state one position before it. The answer follows after `passes` passes. There are no marker tokens around the
latents: they take the positions of reasoning tokens, so that what a student learned from reasoning as text transfers.
The first inputs are embeddings of their own; the student's vocabulary does not change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from kvcore.errors import ConfigError, FieldError
from kvcore.files import write_json
from kvcore.types import Tensor
from student_trainer.model.capture import capture_kv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LATENT_WEIGHTS = "latent.safetensors"
LATENT_CONFIG = "latent_config.json"


class LatentReasoning(nn.Module):
    """The parameters that latent reasoning adds to a student: first inputs and projection.

    Args:
        hidden: the student's hidden size.
        latents: M.
        passes: T, the Jacobi passes.
        embedding_rms: root mean square of the student's embeddings, the initial scale of the inputs.
    """

    def __init__(self, hidden: int, latents: int, passes: int, embedding_rms: float) -> None:
        super().__init__()
        self.latents = latents
        self.passes = passes
        # An embedding rather than a bare parameter: ZeRO-3 gathers what a module's own forward reads.
        self.first_inputs = nn.Embedding(latents, hidden)
        nn.init.normal_(self.first_inputs.weight, std=embedding_rms)
        norm = nn.LayerNorm(hidden)
        nn.init.constant_(norm.weight, embedding_rms)
        self.projection = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), norm)


@dataclass(frozen=True, slots=True)
class AnswerReading:
    """One pass over prompt, latents and answer.

    `logits_BAV` predict each answer token. `k_BLHMD`, `v_BLHMD`: of the latents in the last pass. `prompt_state_BE`:
    the last hidden state of the prompt's last token. `before_answer_BSE`: every layer's state of the last latent, None
    unless requested.
    """

    logits_BAV: Tensor
    k_BLHMD: Tensor
    v_BLHMD: Tensor
    prompt_state_BE: Tensor
    before_answer_BSE: Tensor | None


@dataclass(frozen=True, slots=True)
class TextReading:
    """One pass over text.

    `logits_BTV` predict tokens 1..T-1, empty unless requested. `hidden_BTE`: of the last layer. `states_BSTE`: of every
    layer, None unless requested.
    """

    logits_BTV: Tensor
    k_BLHTD: Tensor
    v_BLHTD: Tensor
    hidden_BTE: Tensor
    states_BSTE: Tensor | None


class LatentStudent(nn.Module):
    """A causal language model with latent reasoning."""

    def __init__(self, lm: PreTrainedModel, reasoning: LatentReasoning) -> None:
        super().__init__()
        self.lm = lm
        self.reasoning = reasoning

    def think(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the latents of a batch of prompts.

        Returns:
            inputs [B,P+M,E] (prompt, latents) and their mask.
        """
        prompt_BPE = self.embed(prompt_ids_BP)
        positions_M = torch.arange(self.reasoning.latents, device=prompt_ids_BP.device)
        latents_BME = self.reasoning.first_inputs(positions_M).expand(len(prompt_BPE), -1, -1)
        mask_BT = functional.pad(prompt_mask_BP, (0, self.reasoning.latents), value=True)
        before_first = prompt_BPE.shape[1] - 1
        for _ in range(self.reasoning.passes):
            hidden_BTE, _ = self._hidden(torch.cat([prompt_BPE, latents_BME], dim=1), mask_BT)
            latents_BME = self.reasoning.projection(hidden_BTE[:, before_first:-1])
        return torch.cat([prompt_BPE, latents_BME], dim=1), mask_BT

    def read_answer(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        answer_ids_BA: Tensor,
        answer_mask_BA: Tensor,
        *,
        all_layers: bool = False,
    ) -> AnswerReading:
        """Computes the latents, then reads the answer. `all_layers`: keep every layer's state before the answer."""
        inputs_BTE, mask_BT = self.think(prompt_ids_BP, prompt_mask_BP)
        end = inputs_BTE.shape[1]
        inputs_BTE = torch.cat([inputs_BTE, self.embed(answer_ids_BA[:, :-1])], dim=1)
        mask_BT = torch.cat([mask_BT, answer_mask_BA[:, :-1]], dim=1)
        with capture_kv(self.lm) as capture:
            hidden_BTE, layers = self._hidden(inputs_BTE, mask_BT, all_layers=all_layers)
        start = end - self.reasoning.latents
        k_BLHMD, v_BLHMD = capture.columns(start, end)
        return AnswerReading(
            self._logits(hidden_BTE[:, end - 1 :]),
            k_BLHMD,
            v_BLHMD,
            hidden_BTE[:, start - 1],
            torch.stack([layer[:, end - 1] for layer in layers], dim=1) if layers else None,
        )

    def read_text(
        self, ids_BT: Tensor, mask_BT: Tensor, *, all_layers: bool = False, predict: bool = True
    ) -> TextReading:
        """Reads text like any language model.

        `all_layers`: keep every layer's states. `predict`: compute logits, which are the largest tensor.
        """
        with capture_kv(self.lm) as capture:
            hidden_BTE, layers = self._hidden(self.embed(ids_BT), mask_BT, all_layers=all_layers)
        k_BLHTD, v_BLHTD = capture.columns(0, ids_BT.shape[1])
        states_BSTE = torch.stack(layers, dim=1) if layers else None
        logits_BTV = self._logits(hidden_BTE[:, : -1 if predict else 0])
        return TextReading(logits_BTV, k_BLHTD, v_BLHTD, hidden_BTE, states_BSTE)

    def logits(self, inputs_BTE: Tensor, mask_BT: Tensor, first: int = 0) -> Tensor:
        """Logits [B,T-first,V] of input embeddings, from position `first` on."""
        hidden_BTE, _ = self._hidden(inputs_BTE, mask_BT)
        return self._logits(hidden_BTE[:, first:])

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [...,E] of token ids."""
        return self.lm.get_input_embeddings()(ids)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.lm.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        return head(hidden)

    def _hidden(
        self, inputs_BTE: Tensor, mask_BT: Tensor, *, all_layers: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states [B,T,E], and every layer's output if requested."""
        positions_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.lm.base_model(
            inputs_embeds=inputs_BTE,
            attention_mask=mask_BT.long(),
            position_ids=positions_BT,
            use_cache=False,
            output_hidden_states=all_layers,
        )
        # The first one holds the embeddings.
        return output.last_hidden_state, tuple(output.hidden_states[1:]) if all_layers else ()

    @torch.no_grad()
    def generate(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor, max_new_tokens: int, *, latent: bool) -> Tensor:
        """Greedy continuation [B,max_new_tokens] after the latents (`latent`) or straight after the prompt.

        Every call takes `max_new_tokens` steps, so that ranks that share parameters run the same passes. The caller
        cuts the tokens at the first end of sequence.
        """
        if latent:
            inputs_BTE, mask_BT = self.think(prompt_ids_BP, prompt_mask_BP)
        else:
            inputs_BTE, mask_BT = self.embed(prompt_ids_BP), prompt_mask_BP
        cache = None
        tokens: list[Tensor] = []
        for _ in range(max_new_tokens):
            positions_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_BTE.shape[1] :]
            output = self.lm.base_model(
                inputs_embeds=inputs_BTE,
                attention_mask=mask_BT.long(),
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            next_B = self._logits(output.last_hidden_state[:, -1]).argmax(dim=-1)
            tokens.append(next_B)
            inputs_BTE = self.embed(next_B[:, None])
            mask_BT = functional.pad(mask_BT, (0, 1), value=True)
        return torch.stack(tokens, dim=1)


def new_reasoning(lm: PreTrainedModel, latents: int, passes: int, seed: int) -> LatentReasoning:
    """New latent parameters for a student, the same on every rank."""
    weight: Tensor = lm.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
    # No devices: otherwise each rank would open a context on every GPU of its machine.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rms = float(weight.detach().float().pow(2).mean().sqrt())
        return LatentReasoning(int(weight.shape[1]), latents, passes, rms)


def save_reasoning(reasoning: LatentReasoning, tensors: dict[str, Tensor], directory: Path) -> None:
    """Writes latent parameters next to a student's weights. `tensors`: the module's gathered state."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / LATENT_WEIGHTS)
    settings = {"latents": reasoning.latents, "passes": reasoning.passes}
    write_json(directory / LATENT_CONFIG, settings)


def load_reasoning(lm: PreTrainedModel, directory: Path, latents: int, passes: int) -> LatentReasoning | None:
    """The latent parameters saved next to a student, or None.

    Raises:
        ConfigError: they were saved for another number of latents.
    """
    weights = directory / LATENT_WEIGHTS
    if not weights.is_file():
        return None
    saved = json.loads((directory / LATENT_CONFIG).read_text(encoding="utf-8"))
    if saved["latents"] != latents:
        raise ConfigError(
            f"student.latents: {directory} was trained with {saved['latents']}, the configuration says {latents}"
        )
    reasoning = new_reasoning(lm, latents, passes, seed=0)
    reasoning.load_state_dict(load_file(weights))
    return reasoning


def saved_reasoning(lm: PreTrainedModel, directory: Path, field: str) -> LatentReasoning | None:
    """The latent parameters saved next to a student, with the settings saved with them; None if there are none.

    Args:
        lm: the student's language model.
        directory: the directory from which it was loaded.
        field: the field of `directory` that errors name.

    Raises:
        FieldError: one of the two files is missing.
    """
    files = [directory / name for name in (LATENT_CONFIG, LATENT_WEIGHTS)]
    present = [file.is_file() for file in files]
    if not any(present):
        return None
    if not all(present):
        missing = files[present.index(False)]
        raise FieldError(field, f"{directory} is a latent student, but {missing.name} is missing")
    settings = json.loads(files[0].read_text(encoding="utf-8"))
    return load_reasoning(lm, directory, settings["latents"], settings["passes"])
