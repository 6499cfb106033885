"""The settings of `load_student`, of `Student`, and of the commands that use them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcore.config import Device, NonNegativeInt, PositiveInt, StrictModel, Text

PromptFormat = Literal["plain", "question", "chat"]


class LoadingSettings(StrictModel):
    """Where a model is loaded, and in which data type."""

    device: Device = "auto"
    """Device of the model: auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the weights. `auto` keeps the type in which they were saved."""


class ThinkingSettings(StrictModel):
    """How a prompt is written, and how long a latent student thinks about it."""

    format: PromptFormat | None = None
    """`plain`: the text as it is. `question`: between `Question:` and `Answer:`, as in the data of the recipe and in
    `kvdistill eval`. `chat`: as a user's message in the tokenizer's chat template. The default is the format of the
    student's training (`data.format`), and `plain` for other models."""
    system_prompt: Text | None = None
    """System message of chats that have none. The default is that of the student's training (`data.system_prompt`)."""
    latents: PositiveInt | None = None
    """Number of latents, at most as many as the student was trained with. All by default."""
    passes: PositiveInt | None = None
    """Number of passes over the latents. The default is the number used in training."""
    batch_size: PositiveInt = 8
    """Number of prompts in a batch."""


class GenerationSettings(ThinkingSettings):
    """The settings of `ThinkingSettings`, and how the answer is generated."""

    max_new_tokens: PositiveInt = 256
    """Maximum number of tokens of an answer."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Softmax temperature. 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Tokens are drawn from the smallest set whose probabilities reach this sum."""
    seed: NonNegativeInt = 0
    """Seed of sampling. The sampled text depends only on the seed and the prompt."""
