"""The engine on Hugging Face transformers: any decoder-only model with standard attention, in this process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from kvcore.errors import FieldError
from kvcore.extras import needs
from kvcore.models.attention_taps import (
    ATTENTION_NAME,
    AnswerRows,
    LayerTap,
    Receive,
    answer_importance,
    tapped,
)
from kvcore.models.context import context_length
from kvcore.models.loading import ModelSource, check_vocabulary, find_model
from kvcore.plan import CODECS, SELECTORS, SamplingParams
from kvcore.tensors.chat import ChatTemplate
from kvcore.tensors.offsets import fingerprint, read_text
from kvcore.tensors.projections import KVProjection, kv_projections, unsupported
from kvcore.types import Chat, Sample, TeacherInfo, Tensor
from teacher_server.config import ServeConfig
from teacher_server.engines.base import (
    SPAN_KINDS,
    Emit,
    ExecutionTimings,
    Fail,
    GeneratedText,
    LayerOutput,
    LayerSink,
    PlannedSample,
    SampleFailure,
    TokenizedSample,
    Wanted,
)
from teacher_server.engines.batch_check import check_same, short_and_long
from teacher_server.engines.hf.hf_checks import exact_kv_heads
from teacher_server.engines.hf.hf_generate import HFGenerator
from teacher_server.engines.text_reader import read_sample
from teacher_server.engines.weights import weights_digest
from teacher_server.plan_execution import execute

logger = logging.getLogger(__name__)

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The weights' type after bitsandbytes quantisation, by configuration field.
QUANTISED = {"load_in_8bit": "int8", "load_in_4bit": "fp4"}

# On a CPU the time per token is constant from about 100 tokens. On a GPU a pass of fewer tokens than this mostly waits
# for the launches of kernels; the number is an estimate.
SMALL_BATCH_TOKENS_CPU = 128
SMALL_BATCH_TOKENS_GPU = 1024


class _LastLayerReadError(Exception):
    """Ends a forward pass after the last requested layer. Never leaves this module."""


class HFReader:
    """A transformers tokenizer as `TextReader`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._special = set(cast("list[int]", tokenizer.all_special_ids))
        self._template: ChatTemplate | None = None

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """See `TextReader.read`."""
        return read_text(self._tokenizer, text, add_special_tokens=True)

    def read_chat(self, text: str, chat: Chat, field: str) -> tuple[list[int], list[int]]:
        """See `TextReader.read_chat`."""
        try:
            self._template = self._template or ChatTemplate(self._tokenizer, field)
            return self._template.read(text, chat)
        except FieldError as error:
            raise FieldError(field, error.problem) from error

    def byte_ends(self, token_ids: Sequence[int]) -> list[int]:
        """See `TextReader.byte_ends`: known if the decoded text encodes to the same token ids."""
        plain = [token_id for token_id in token_ids if token_id not in self._special]
        text = cast("str", self._tokenizer.decode(plain, clean_up_tokenization_spaces=False))
        read_ids, read_ends = read_text(self._tokenizer, text, add_special_tokens=False) if text else ([], [])
        if read_ids != plain:
            return [-1] * len(token_ids)
        ends = iter(read_ends)
        return [-1 if token_id in self._special else next(ends) for token_id in token_ids]


class HFEngine:
    """A `TeacherEngine` on a frozen transformers model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ServeConfig,
        dtype: str,
        digest: str,
    ) -> None:
        self._base = _base_model(model)
        self._generator = HFGenerator(model, tokenizer)
        self._projections = kv_projections(self._base)
        self._embedding = cast("nn.Embedding", self._base.get_input_embeddings())
        self._reader = HFReader(tokenizer, self._embedding.num_embeddings)
        kv_heads = self._check_exact()
        text_config = model.config.get_text_config()
        self._info = TeacherInfo(
            model=config.teacher_name,
            weights_digest=digest,
            tokenizer_fingerprint=fingerprint(tokenizer, with_template=True),
            layers=len(self._projections),
            kv_heads=kv_heads,
            head_dim=self._projections[0].head_dim,
            rope=dict(getattr(text_config, "rope_parameters", None) or {}),
            engine="hf",
            dtype=dtype,
            max_sample_tokens=_max_sample_tokens(config.max_sample_tokens, model.config),
            max_samples_per_request=config.max_samples_per_request,
            max_frame_bytes=config.max_frame_bytes,
            selectors=tuple(SELECTORS),
            codecs=tuple(CODECS),
            max_map_bytes=config.max_map_bytes,
        )
        self._check_left_padding()

    @property
    def info(self) -> TeacherInfo:
        """See `TeacherEngine.info`."""
        return self._info

    @property
    def small_batch_tokens(self) -> int | None:
        """See `TeacherEngine.small_batch_tokens`."""
        return SMALL_BATCH_TOKENS_GPU if self._embedding.weight.is_cuda else SMALL_BATCH_TOKENS_CPU

    @property
    def concurrent_batches(self) -> int:
        """See `TeacherEngine.concurrent_batches`."""
        return 1

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """See `TeacherEngine.tokenize`."""
        return self.tokenize_up_to(sample, self._info.max_sample_tokens)

    def tokenize_up_to(self, sample: Sample, max_tokens: int) -> TokenizedSample:
        """As `tokenize`, with another limit than `info.max_sample_tokens`."""
        return read_sample(sample, self._reader, max_tokens)

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        """See `LayerwiseModel.prefill`. `sink` gets a layer before its attention is computed."""
        answer = self._answer_rows(batch) if with_importance else None
        last = max(layers)

        def receive(tap: LayerTap) -> None:
            largest_BHT, mean_BHT = (None, None) if answer is None else answer_importance(tap, answer)
            sink(LayerOutput(tap.layer, tap.k_BHTD, tap.v_BHTD, largest_BHT, mean_BHT))
            if tap.layer == last:
                raise _LastLayerReadError

        self._forward([tokens.token_ids for tokens in batch], [self._projections[layer] for layer in layers], receive)

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        """See `TeacherEngine.run`."""
        return execute(self, batch, emit, fail, wanted)

    def generate(
        self, prompts: Sequence[TokenizedSample], sampling: SamplingParams, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """See `TeacherEngine.generate`."""
        return self._generator.generate(prompts, sampling, wanted)

    def check(self) -> None:
        """See `TeacherEngine.check`: it can always run."""

    def close(self) -> None:
        """See `TeacherEngine.close`."""
        on_gpu = self._embedding.weight.is_cuda
        self._projections.clear()
        del self._base, self._embedding, self._generator
        if on_gpu:
            torch.cuda.empty_cache()

    def _forward(
        self, token_ids: Sequence[Sequence[int]], projections: Sequence[KVProjection], receive: Receive
    ) -> None:
        """One pass over right-padded tokens. Attention is causal, so no token sees padding and no mask is needed."""
        longest = max(map(len, token_ids))
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in token_ids]
        input_ids_BT = torch.tensor(padded, device=self._embedding.weight.device)
        with torch.inference_mode(), tapped(projections, receive):
            try:
                self._base(input_ids=input_ids_BT, use_cache=False)
            except _LastLayerReadError:
                return

    def _answer_rows(self, batch: Sequence[TokenizedSample]) -> AnswerRows:
        answer = SPAN_KINDS.index("answer")
        rows = [[place for place, span in enumerate(tokens.span_ids) if span == answer] for tokens in batch]
        return AnswerRows.of(rows, self._embedding.weight.device)

    def _check_exact(self) -> int:
        """Check what the attention of a few tokens reads; returns the number of KV heads."""
        taps: dict[int, LayerTap] = {}
        tokens = [place % self._reader.vocabulary for place in range(4)]

        def receive(tap: LayerTap) -> None:
            taps[tap.layer] = tap

        self._forward([tokens], self._projections, receive)
        return exact_kv_heads(type(self._base).__name__, taps, len(self._projections))

    def _check_left_padding(self) -> None:
        """Check that keys and values of a prompt do not depend on a longer prompt beside it in a generation."""
        if self._generator.can_generate:
            short, long = short_and_long(self)
            check_same(self._info, self._generation_kv([short]), self._generation_kv([short, long]), "left")

    def _generation_kv(self, prompts: Sequence[TokenizedSample]) -> dict[int, tuple[Tensor, Tensor]]:
        """The first prompt's keys and values when text is generated, by layer."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        tokens = len(prompts[0].prompt_ids)

        def receive(tap: LayerTap) -> None:
            found[tap.layer] = tap.k_BHTD[0, :, -tokens:], tap.v_BHTD[0, :, -tokens:]

        with tapped(self._projections, receive):
            self._generator.generate(prompts, SamplingParams(max_new_tokens=1), lambda _row: True)
        return found


def load(config: ServeConfig) -> HFEngine:
    """Load a model and its tokenizer from a directory or the hub.

    Raises:
        FieldError: a model, device or option is not available on this host; names the field.
        UnsupportedModelError: the keys and values of the model's attention cannot be read exactly.
    """
    # The log is JSON Lines, without progress bars.
    disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    dtype = _dtype(config, device)
    source = _find(config)
    model_config, tokenizer = source.config(), source.tokenizer()
    model = source.causal_lm(model_config, head_optional=True, **_options(config, device, DTYPES[dtype]))
    check_vocabulary(source, tokenizer, model)
    quantised = _quantised(config)
    loaded_as = f"{QUANTISED[quantised]} weights in {dtype}" if quantised else dtype
    digest = weights_digest(source.directory, model.config.to_dict(), loaded_as)
    engine = HFEngine(model.eval().requires_grad_(False), tokenizer, config, loaded_as, digest)
    logger.info("loaded %s on %s in %s", config.teacher_name, device, loaded_as)
    return engine


def load_first_layers(config: ServeConfig, layers: int, dtype: DtypeName) -> tuple[HFEngine, PreTrainedConfig]:
    """Load the model's first layers on the CPU; returns them and the configuration of the whole model.

    They are the reference for another engine's tokens, keys and values. `info` has the identity of the whole model.

    Raises:
        FieldError, UnsupportedModelError: as in `load`.
    """
    source = _find(config)
    whole, tokenizer = source.config(), source.tokenizer()
    options = _options(config, torch.device("cpu"), DTYPES[dtype])
    model = source.causal_lm(_first_layers(source.config(), layers), head_optional=True, all_layers=False, **options)
    check_vocabulary(source, tokenizer, model)
    digest = weights_digest(source.directory, whole.to_dict(), dtype)
    return HFEngine(model.eval().requires_grad_(False), tokenizer, config, dtype, digest), whole


def _find(config: ServeConfig) -> ModelSource:
    return find_model(config.model, "model", revision=config.revision, trust_remote_code=config.trust_remote_code)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FieldError("device", f"got '{name}'; torch sees {torch.cuda.device_count()} GPUs here")
    return device


def _dtype(config: ServeConfig, device: torch.device) -> DtypeName:
    quantised = _quantised(config)
    if quantised and device.type != "cuda":
        raise FieldError(quantised, f"needs a GPU, and the device is '{device}'")
    if quantised and not is_bitsandbytes_available():
        raise FieldError(quantised, needs("gpu", "bitsandbytes"))
    if config.dtype != "auto":
        return config.dtype
    return "bf16" if device.type == "cuda" else "fp32"


def _quantised(config: ServeConfig) -> str | None:
    """The field that asks for quantised weights, or None."""
    return next((field for field in QUANTISED if getattr(config, field)), None)


def _options(config: ServeConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """How to load the model: arguments of transformers' `from_pretrained`."""
    options: dict[str, Any] = {"attn_implementation": ATTENTION_NAME, "dtype": dtype}
    if device.type == "cuda":
        # Load straight to the GPU, so that the model need not fit into host memory.
        options["device_map"] = {"": device}
    if config.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    return options


def _first_layers(model_config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Changes a configuration to that of the model's first layers."""
    text_config = model_config.get_text_config()
    text_config.num_hidden_layers = min(layers, text_config.num_hidden_layers)
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
    return model_config


def _base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; logits are not needed."""
    base = model.base_model
    if base is model or not isinstance(base, PreTrainedModel):
        raise unsupported(type(model).__name__, "it has no base model that runs without a head")
    return base


def _max_sample_tokens(requested: int | None, model_config: PreTrainedConfig) -> int:
    context = context_length(model_config)
    if context is None and requested is None:
        raise FieldError("max_sample_tokens", "is required, because the model's configuration has no context length")
    if context is not None and requested is not None and requested > context[0]:
        raise FieldError("max_sample_tokens", f"got {requested}; the model takes at most {context[0]} tokens")
    return requested or (context[0] if context else 0)
