"""A student that reasons in latents instead of text (PCCoT, arXiv 2506.18582; KaVa, arXiv 2510.02312).

The sequence is prompt, M latents, answer. Each Jacobi pass replaces the input of latent i by a projection of the last
hidden state one position before it, or by this state itself. The answer follows after `passes` passes. There are no
marker tokens around the latents: they take the positions of reasoning tokens, so that what a student learned from
reasoning as text transfers. The first inputs are embeddings of their own; the student's vocabulary does not change.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from kvcore.errors import ConfigError, FieldError
from kvcore.models.files import model_config, weight_files
from kvcore.models.latent_folder import (
    CODE,
    LATENT_PREFIX,
    LATENT_WEIGHTS,
    LatentSettings,
    is_latent,
    latent_settings,
    make_latent,
)
from kvcore.types import Tensor
from student_trainer.model.capture import capture_kv
from student_trainer.model.kept_prompt import KeptPrompt, PromptRecorder, let_layers_checkpoint_with_cache
from student_trainer.model.lm_head import logits_of, token_cross_entropy

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# What transformers runs to load a latent student.
HUB_CODE = Path(__file__).with_name(f"{CODE}.py")
# Beside the weights of latent students of versions without their own model class.
_OLD_CONFIG = "latent_config.json"
# Tokens whose embeddings set the scale of the first inputs.
_SCALE_TOKENS = 4096


class LatentReasoning(nn.Module):
    """The parameters that latent reasoning adds to a student: first inputs and projection.

    Args:
        hidden: the student's hidden size.
        latents: M.
        passes: T, the Jacobi passes.
        embedding_rms: root mean square of the student's embeddings, the initial scale of the inputs.
        projects: whether the inputs are projections of hidden states. Otherwise they are the hidden states themselves.
    """

    def __init__(self, hidden: int, latents: int, passes: int, embedding_rms: float, *, projects: bool = True) -> None:
        super().__init__()
        self.latents = latents
        self.passes = passes
        self.projects = projects
        # An embedding rather than a bare parameter: ZeRO-3 gathers what a module's own forward reads.
        self.first_inputs = nn.Embedding(latents, hidden)
        nn.init.normal_(self.first_inputs.weight, std=embedding_rms)
        self.projection: nn.Module = nn.Identity()
        if not projects:
            return
        norm = nn.LayerNorm(hidden)
        nn.init.constant_(norm.weight, embedding_rms)
        self.projection = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), norm)


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A batch of prompts after one pass over them.

    `prompt_BPE`, `mask_BP`: the input embeddings and their mask. `kept`: keys and values, which later passes read.
    `last_state_BE`: the last layer's state of the last token. `states_BSE`: every layer's, None unless requested.
    """

    prompt_BPE: Tensor
    mask_BP: Tensor
    kept: KeptPrompt
    last_state_BE: Tensor
    states_BSE: Tensor | None

    def rows(self, indices: Sequence[int]) -> ReadPrompt:
        """The same of some samples, which may repeat."""
        states_BSE = None if self.states_BSE is None else self.states_BSE[indices]
        tensors = (self.prompt_BPE[indices], self.mask_BP[indices])
        return ReadPrompt(*tensors, self.kept.rows(indices), self.last_state_BE[indices], states_BSE)


@dataclass(frozen=True, slots=True)
class Thought:
    """A batch of prompts and the latents after the last pass.

    `earlier_BME`: for each pass but the last, the last layer's states one position before each latent, when the latents
    after that pass are read.
    """

    prompt: ReadPrompt
    latents_BME: Tensor
    earlier_BME: tuple[Tensor, ...] = ()

    def inputs(self) -> Tensor:
        """Input embeddings [B,P+M,E] of prompt and latents."""
        return torch.cat([self.prompt.prompt_BPE, self.latents_BME], dim=1)

    def mask(self) -> Tensor:
        """The mask [B,P+M] of prompt and latents."""
        return functional.pad(self.prompt.mask_BP, (0, self.latents_BME.shape[1]), value=True)

    def rows(self, indices: Sequence[int]) -> Thought:
        """The same of some samples, which may repeat."""
        earlier_BME = tuple(before_BME[indices] for before_BME in self.earlier_BME)
        return Thought(self.prompt.rows(indices), self.latents_BME[indices], earlier_BME)


@dataclass(frozen=True, slots=True)
class AnswerReading:
    """One pass over latents and answer, or over latents, steps that are still text, and answer.

    `hidden_BAE`: the last layer's states that predict each token after the latents. `before_latents_BME`: those one
    position before each latent, from which the head reads what the student would write in the latent's place.
    `k_BLHMD`, `v_BLHMD`: of the latents in the last pass. `before_answer_BSE`: every layer's state one position before
    the answer, None unless requested.
    """

    hidden_BAE: Tensor
    before_latents_BME: Tensor
    k_BLHMD: Tensor
    v_BLHMD: Tensor
    before_answer_BSE: Tensor | None


@dataclass(frozen=True, slots=True)
class ContinuationReading:
    """One pass over text that follows a prompt, without latents between them.

    `hidden_BRE`: the last layer's states that predict each token. `states_BSRE`: every layer's states of the same
    positions, None unless requested.
    """

    hidden_BRE: Tensor
    states_BSRE: Tensor | None


@dataclass(frozen=True, slots=True)
class TextReading:
    """One pass over whole text. `hidden_BTE`: of the last layer."""

    k_BLHTD: Tensor
    v_BLHTD: Tensor
    hidden_BTE: Tensor


class LatentStudent(nn.Module):
    """A causal language model with latent reasoning."""

    def __init__(self, lm: PreTrainedModel, reasoning: LatentReasoning) -> None:
        super().__init__()
        self.lm = lm
        self.reasoning = reasoning
        let_layers_checkpoint_with_cache(lm)

    def read_prompt(self, ids_BP: Tensor, mask_BP: Tensor, *, all_layers: bool = False) -> ReadPrompt:
        """Reads left-padded prompts. `all_layers`: return every layer's state of the last token."""
        prompt_BPE = self.embed(ids_BP)
        recorder = PromptRecorder()
        hidden_BPE, layers = self._hidden(prompt_BPE, mask_BP, recorder, all_layers=all_layers)
        states_BSE = torch.stack([layer[:, -1] for layer in layers], dim=1) if layers else None
        return ReadPrompt(prompt_BPE, mask_BP, recorder.kept(), hidden_BPE[:, -1], states_BSE)

    def think(self, prompt: ReadPrompt, latents: int | None = None) -> Thought:
        """Computes the latents of a batch of prompts. `latents`: only the first ones; all by default."""
        positions_M = torch.arange(latents or self.reasoning.latents, device=prompt.mask_BP.device)
        thought = Thought(prompt, self.reasoning.first_inputs(positions_M).expand(len(prompt.mask_BP), -1, -1))
        for number in range(self.reasoning.passes):
            hidden_BME, _ = self._hidden(thought.latents_BME, thought.mask(), prompt.kept)
            before_BME = torch.cat([prompt.last_state_BE[:, None], hidden_BME[:, :-1]], dim=1)
            # The first pass reads the first inputs, which no pass has computed.
            earlier_BME = (*thought.earlier_BME, before_BME) if number else ()
            thought = Thought(prompt, self.reasoning.projection(before_BME), earlier_BME)
        return thought

    def read_answer(
        self,
        thought: Thought,
        ids_BA: Tensor,
        mask_BA: Tensor,
        answer_at_B: Tensor | None = None,
        *,
        all_layers: bool = False,
    ) -> AnswerReading:
        """Reads what follows the latents.

        Args:
            thought: prompts and latents.
            ids_BA, mask_BA: the right-padded answer, or steps of the reasoning and the answer.
            answer_at_B: where the answer begins in them; by default at the first token.
            all_layers: return every layer's state before the answer.
        """
        latents = thought.latents_BME.shape[1]
        inputs_BTE = torch.cat([thought.latents_BME, self.embed(ids_BA[:, :-1])], dim=1)
        mask_BT = torch.cat([thought.mask(), mask_BA[:, :-1]], dim=1)
        with capture_kv(self.lm) as capture:
            hidden_BTE, layers = self._hidden(inputs_BTE, mask_BT, thought.prompt.kept, all_layers=all_layers)
        k_BLHMD, v_BLHMD = capture.columns(0, latents)
        rows_B = torch.arange(len(ids_BA), device=ids_BA.device)
        ends_B = latents - 1 + (torch.zeros_like(rows_B) if answer_at_B is None else answer_at_B)
        before_BSE = torch.stack([layer[rows_B, ends_B] for layer in layers], dim=1) if layers else None
        before_BME = torch.cat([thought.prompt.last_state_BE[:, None], hidden_BTE[:, : latents - 1]], dim=1)
        return AnswerReading(hidden_BTE[:, latents - 1 :], before_BME, k_BLHMD, v_BLHMD, before_BSE)

    def read_continuation(
        self, prompt: ReadPrompt, ids_BR: Tensor, mask_BR: Tensor, *, all_layers: bool = False
    ) -> ContinuationReading:
        """Reads text straight after the prompt. `all_layers`: return every layer's states; `prompt` needs them too."""
        mask_BT = torch.cat([prompt.mask_BP, mask_BR[:, :-1]], dim=1)
        hidden_BRE, layers = self._hidden(self.embed(ids_BR[:, :-1]), mask_BT, prompt.kept, all_layers=all_layers)
        hidden_BRE = torch.cat([prompt.last_state_BE[:, None], hidden_BRE], dim=1)
        if not all_layers:
            return ContinuationReading(hidden_BRE, None)
        assert prompt.states_BSE is not None, "the prompt was read without every layer's states"
        states_BSRE = torch.cat([prompt.states_BSE[:, :, None], torch.stack(layers, dim=1)], dim=2)
        return ContinuationReading(hidden_BRE, states_BSRE)

    def read_text(self, ids_BT: Tensor, mask_BT: Tensor) -> TextReading:
        """Reads text like any language model."""
        with capture_kv(self.lm) as capture:
            hidden_BTE, _ = self._hidden(self.embed(ids_BT), mask_BT)
        return TextReading(*capture.columns(0, ids_BT.shape[1]), hidden_BTE)

    def hidden(self, inputs_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        """The last layer's states [B,T,E] of input embeddings."""
        return self._hidden(inputs_BTE, mask_BT)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [...,V] of the last layer's states."""
        return logits_of(self.lm, hidden)

    def cross_entropy(self, hidden_BTE: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Cross-entropy [B,T] of each target from the state that predicts it; 0 where masked out."""
        return token_cross_entropy(self.lm, hidden_BTE, targets_BT, mask_BT)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [...,E] of token ids."""
        return self.lm.get_input_embeddings()(ids)

    def _hidden(
        self, inputs_BTE: Tensor, mask_BT: Tensor, cache: Cache | None = None, *, all_layers: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states of the inputs, and every layer's output if requested.

        `mask_BT`: of the inputs and of what the cache holds before them.
        """
        positions_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.lm.base_model(
            inputs_embeds=inputs_BTE,
            attention_mask=mask_BT.long(),
            position_ids=positions_BT[:, -inputs_BTE.shape[1] :],
            past_key_values=cache,
            use_cache=False,
            output_hidden_states=all_layers,
        )
        # The first one holds the embeddings.
        return output.last_hidden_state, tuple(output.hidden_states[1:]) if all_layers else ()


def new_reasoning(
    lm: PreTrainedModel, latents: int, passes: int, seed: int, *, projects: bool = True
) -> LatentReasoning:
    """New latent parameters for a student, the same on every rank. `projects`: see `LatentReasoning`."""
    table: Any = lm.get_input_embeddings()
    rows, hidden = int(table.num_embeddings), int(table.embedding_dim)
    # Some embeddings scale their rows, so the scale is that of their outputs.
    ids = torch.arange(0, rows, math.ceil(rows / _SCALE_TOKENS), device=table.weight.device)
    # No devices: otherwise each rank would open a context on every GPU of its machine.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            rms = float(table(ids).float().pow(2).mean().sqrt())
        return LatentReasoning(hidden, latents, passes, rms, projects=projects)


def save_reasoning(reasoning: LatentReasoning, tensors: dict[str, Tensor], directory: Path) -> None:
    """Adds latent parameters to the folder of a student's backbone, which becomes that of a latent student.

    Args:
        reasoning: the module.
        tensors: its gathered state.
        directory: where the backbone was saved.
    """
    weights = {f"{LATENT_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(weights, directory / LATENT_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(HUB_CODE, directory / HUB_CODE.name)
    make_latent(directory, reasoning.latents, reasoning.passes, projection=reasoning.projects)


def load_reasoning(
    lm: PreTrainedModel, directory: Path, latents: int, passes: int, *, projects: bool = True
) -> LatentReasoning | None:
    """The latent parameters in the folder of a student, or None. `projects`: see `LatentReasoning`.

    Raises:
        ConfigError: they were saved for another number of latents, or with a projection instead of without or reverse.
    """
    saved = _saved_settings(directory, "student.path")
    if saved is None:
        return None
    if saved.latents != latents:
        raise ConfigError(
            f"student.latents: {directory} was trained with {saved.latents}, the configuration says {latents}"
        )
    if saved.projection != projects:
        then, now = ("true" if value else "false" for value in (saved.projection, projects))
        raise ConfigError(f"student.projection: {directory} was trained with {then}, the configuration says {now}")
    return _loaded(lm, directory, replace(saved, passes=passes))


def saved_reasoning(lm: PreTrainedModel, directory: Path, field: str) -> LatentReasoning | None:
    """The latent parameters in the folder of a student, with the settings saved with them; None if there are none.

    Args:
        lm: the student's language model.
        directory: the directory from which it was loaded.
        field: the field of `directory` that errors name.

    Raises:
        FieldError: the folder is incomplete.
    """
    saved = _saved_settings(directory, field)
    return None if saved is None else _loaded(lm, directory, saved)


def _saved_settings(directory: Path, field: str) -> LatentSettings | None:
    tree = model_config(directory, str(directory), field)
    if not is_latent(tree) and (directory / _OLD_CONFIG).is_file():
        # Without its latents it would be another model.
        raise FieldError(
            field, f"{directory} is a latent student of an earlier version, which this one cannot read; train it again"
        )
    return latent_settings(tree) if is_latent(tree) else None


def _loaded(lm: PreTrainedModel, directory: Path, saved: LatentSettings) -> LatentReasoning:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith(LATENT_PREFIX)]  # noqa: SIM118 - no dictionary
            tensors |= {name.removeprefix(LATENT_PREFIX): stored.get_tensor(name) for name in names}
    reasoning = new_reasoning(lm, saved.latents, saved.passes, seed=0, projects=saved.projection)
    reasoning.load_state_dict(tensors)
    return reasoning
