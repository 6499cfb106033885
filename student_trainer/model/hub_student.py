"""A student that reasons in latents, as a model of transformers. It needs torch and transformers only.

kvdistill copies this file beside a student's weights. With `trust_remote_code=True`, `AutoModelForCausalLM` loads the
student through it, and `generate` computes the latents of each prompt before the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

# Weights of the backbone are stored under its own names, so that it can also be loaded alone.
_BACKBONE_NAMES = {r"^(?!backbone\.|reasoning\.)(.+)": r"backbone.\1"}


class KVDistillLatentConfig(PreTrainedConfig):
    """Configuration of a latent student.

    Args:
        text_config: the configuration of its backbone, an ordinary causal language model.
        latents: number of latents M. Fewer than in training are possible.
        passes: number of passes over the latents.
        trained_latents: number of latents in training, if that is not `latents`.
        projection: whether the inputs of latents are projections of hidden states, or the hidden states themselves.
    """

    model_type = "kvdistill_latent"
    # An annotation would make it a field.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        latents: int = 1,
        passes: int = 1,
        trained_latents: int | None = None,
        projection: bool = True,
        **kwargs: Any,
    ) -> None:
        # transformers creates an empty configuration to compare with.
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.latents, self.passes = latents, passes
        self.trained_latents = trained_latents or latents
        self.projection = projection
        super().__init__(**kwargs)


class LatentReasoning(nn.Module):
    """The first inputs of the latents, and the map from a hidden state to the next input of a latent."""

    def __init__(self, hidden: int, latents: int, projection: bool) -> None:
        super().__init__()
        self.first_inputs = nn.Embedding(latents, hidden)
        self.projection: nn.Module = nn.Identity()
        if projection:
            layers = (nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
            self.projection = nn.Sequential(*layers)


class KVDistillLatentForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model that reasons in latents between the prompt and the answer.

    `config.latents` and `config.passes` may be changed after loading: fewer latents, or another number of passes.
    `backbone` is the causal language model without latents.
    """

    config_class = KVDistillLatentConfig
    base_model_prefix = "backbone"
    _is_stateful = True  # The cache holds latents that no token stands for, so it cannot be cut back to some tokens.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: KVDistillLatentConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.text_config)
        hidden = self.backbone.get_input_embeddings().weight.shape[1]
        self.reasoning = LatentReasoning(hidden, config.trained_latents, config.projection)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a student; see `PreTrainedModel.from_pretrained`."""
        kwargs["key_mapping"] = {**_BACKBONE_NAMES, **(kwargs.get("key_mapping") or {})}
        return super().from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's table of input embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's table of input embeddings."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's language-model head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the backbone's language-model head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Reads a prompt and computes its latents, or reads what follows them.

        Args:
            input_ids: without a cache the prompt [B,P], padded on either side; with a cache the text after the latents.
            attention_mask: [B,T] of all tokens, those in the cache included; without entries for the latents.
            past_key_values: the cache that reading the prompt returned.
            inputs_embeds: [B,P,E] instead of `input_ids`.
            position_ids: ignored; positions follow from the mask and the latents.
            labels: not supported, since training needs kvdistill.
            use_cache: must not be False.
            kwargs: for the backbone.

        Returns:
            the cache, and logits: of the next token after the prompt's latents [B,1,V], or of each token read [B,T,V].

        Raises:
            ValueError: an argument is not supported.
        """
        del position_ids
        if labels is not None:
            raise ValueError("labels: a latent student cannot be trained through transformers; use `kvdistill train`")
        if use_cache is False:
            raise ValueError("use_cache: a latent student keeps its latents in the cache; leave use_cache=False out")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None:
            raise ValueError("input_ids: a latent student needs a prompt; give input_ids or inputs_embeds")
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not cached:
            if past_key_values is not None and type(past_key_values) is not DynamicCache:
                kind = type(past_key_values).__name__
                raise ValueError(f"past_key_values: a latent student needs a DynamicCache, got a {kind}")
            inputs_BPE = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            mask_BP = torch.ones(inputs.shape[:2]) if attention_mask is None else attention_mask
            return self._think(inputs_BPE, mask_BP.to(inputs.device).long(), kwargs)
        read = cached - self.config.latents + inputs.shape[1]
        mask_BT = inputs.new_ones(len(inputs), read) if attention_mask is None else attention_mask
        if mask_BT.shape[1] != read:
            raise ValueError(
                f"attention_mask: has {mask_BT.shape[1]} tokens, but the cache and the inputs have {read}, without the "
                f"{self.config.latents} latents; pass the cache that reading the prompt returned, and no other"
            )
        mask_BT = _with_latents(_left_padded(mask_BT.long()), self.config.latents)
        return self._read(self.backbone, inputs, mask_BT, past_key_values, kwargs)

    def _think(self, prompt_BPE: Tensor, mask_BP: Tensor, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
        """Reads the prompt, then the latents as often as there are passes, then predicts the first token."""
        if not 1 <= self.config.latents <= self.config.trained_latents:
            raise ValueError(
                f"config.latents: expected at least 1 and at most {self.config.trained_latents}, as many as in "
                f"training; got {self.config.latents}"
            )
        order_BP = mask_BP.argsort(dim=1, stable=True)
        prompt_BPE = prompt_BPE.gather(1, order_BP[..., None].expand_as(prompt_BPE))
        mask_BP = _left_padded(mask_BP)
        # All keys and values are kept, in layers with a sliding window, too, because the latents are read repeatedly.
        cache = DynamicCache()
        body = self.backbone.base_model
        last_B1E = self._read(body, prompt_BPE, mask_BP, cache, {}).last_hidden_state[:, -1:]
        mask_BT = _with_latents(mask_BP, self.config.latents)
        latents_BME = self.reasoning.first_inputs.weight[: self.config.latents].expand(len(mask_BP), -1, -1)
        for _ in range(self.config.passes):
            hidden_BME = self._read(body, latents_BME, mask_BT, cache, {}).last_hidden_state
            cache.crop(-self.config.latents)
            latents_BME = self.reasoning.projection(torch.cat([last_B1E, hidden_BME[:, :-1]], dim=1))
        output = self._read(self.backbone, latents_BME, mask_BT, cache, kwargs)
        output.logits = output.logits[:, -1:]
        return output

    def _read(self, module: Any, inputs: Tensor, mask_BT: Tensor, cache: Any, kwargs: dict[str, Any]) -> Any:
        """Reads ids [B,T] or embeddings [B,T,E] after what is in the cache. `mask_BT`: of both."""
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        given = {name: inputs, "attention_mask": mask_BT, "position_ids": positions_BT}
        return module(**given, past_key_values=cache, use_cache=True, **kwargs)


def _left_padded(mask_BT: Tensor) -> Tensor:
    """The mask after all padding has moved to the left."""
    return mask_BT.sort(dim=1).values


def _with_latents(mask_BT: Tensor, latents: int) -> Tensor:
    """The mask with the latents, at its end: all is True after the padding, so their place makes no difference."""
    return nn.functional.pad(mask_BT, (0, latents), value=1)
