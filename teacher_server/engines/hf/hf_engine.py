"""The engine on Hugging Face transformers: any decoder-only model with standard attention, in this process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from kvcore.errors import FieldError, UnsupportedModelError
from kvcore.extras import needs
from kvcore.plan import CODECS, SELECTORS, SamplingParams
from kvcore.tensors.offsets import fingerprint, read_text
from kvcore.tensors.projections import KVProjection, kv_projections
from kvcore.types import Sample, TeacherInfo
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
from teacher_server.engines.hf.hf_attention import (
    ATTENTION_NAME,
    AnswerRows,
    LayerTap,
    Receive,
    answer_importance,
    tapped,
)
from teacher_server.engines.hf.hf_generate import HFGenerator
from teacher_server.engines.text_reader import read_sample
from teacher_server.engines.weights import model_directory, weight_files, weights_digest
from teacher_server.plan_execution import execute

logger = logging.getLogger(__name__)

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The weights' type after bitsandbytes quantisation, by configuration field.
QUANTISED = {"load_in_8bit": "int8", "load_in_4bit": "fp4"}

# Attention arguments of some models that scaled-dot-product attention ignores.
_INEXACT_ARGUMENTS = ("softcap", "s_aux", "position_bias")
# Relative tolerance for the rounding of half-precision rotary embeddings; a transformed key or value differs far more.
_SAME = 0.02

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class _LastLayerReadError(Exception):
    """Ends a forward pass after the last requested layer. Never leaves this module."""


class HFReader:
    """A transformers tokenizer as `TextReader`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._special = set(cast("list[int]", tokenizer.all_special_ids))

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """See `TextReader.read`."""
        return read_text(self._tokenizer, text, add_special_tokens=True)

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
            tokenizer_fingerprint=fingerprint(tokenizer),
            layers=len(self._projections),
            kv_heads=kv_heads,
            head_dim=self._projections[0].head_dim,
            rope=dict(getattr(text_config, "rope_parameters", None) or {}),
            engine="hf",
            dtype=dtype,
            max_sample_tokens=_max_sample_tokens(config.max_sample_tokens, text_config),
            max_samples_per_request=config.max_samples_per_request,
            max_frame_bytes=config.max_frame_bytes,
            selectors=tuple(SELECTORS),
            codecs=tuple(CODECS),
        )

    @property
    def info(self) -> TeacherInfo:
        """See `TeacherEngine.info`."""
        return self._info

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
        """Check on a few tokens that the captured keys and values are those of the attention; returns the KV heads.

        The rotary embedding does not rotate the first position and changes no key's norm, except for one constant
        factor of some RoPE scalings.
        """
        taps: dict[int, LayerTap] = {}
        tokens = [place % self._reader.vocabulary for place in range(4)]

        def receive(tap: LayerTap) -> None:
            taps[tap.layer] = tap

        self._forward([tokens], self._projections, receive)
        name = type(self._base).__name__
        if len(taps) != len(self._projections):
            missing = sorted(set(range(len(self._projections))) - taps.keys())
            raise UnsupportedModelError(f"{name}: layers {missing} do not attend with keys and values of their own")
        for layer, tap in taps.items():
            inexact = [argument for argument in _INEXACT_ARGUMENTS if tap.extras.get(argument) is not None]
            if inexact:
                raise UnsupportedModelError(f"{name}: layer {layer} attends with {', '.join(inexact)}: not supported")
            if not _attended_as_read(tap):
                raise UnsupportedModelError(
                    f"{name}: layer {layer} changes its keys or values by more than a rotary embedding between their "
                    "projection and the attention"
                )
        heads = {tap.k_BHTD.shape[1] for tap in taps.values()}
        if len(heads) != 1:
            raise UnsupportedModelError(f"{name}: its layers differ in key/value heads: {sorted(heads)}")
        return heads.pop()


def _attended_as_read(tap: LayerTap) -> bool:
    if tap.attended_v_BHTD.shape != tap.v_BHTD.shape or tap.rotated_k_BHTD.shape != tap.k_BHTD.shape:
        return False
    read, attended = tap.k_BHTD.float(), tap.rotated_k_BHTD.float()
    first, attended_first = read[:, :, 0], attended[:, :, 0]
    factor = (first * attended_first).sum() / first.square().sum()
    return (
        torch.equal(tap.attended_v_BHTD, tap.v_BHTD)
        and bool((attended_first - factor * first).norm() <= _SAME * attended_first.norm())
        and torch.allclose(attended.norm(dim=-1), factor * read.norm(dim=-1), rtol=_SAME)
    )


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
    directory = model_directory(config.model, config.revision, config.trust_remote_code)
    weight_files(directory)
    tokenizer = _load_tokenizer(directory, config)
    model = _load_model(directory, config, device, DTYPES[dtype])
    quantised = _quantised(config)
    loaded_as = f"{QUANTISED[quantised]} weights in {dtype}" if quantised else dtype
    digest = weights_digest(directory, model.config.to_dict(), loaded_as)
    engine = HFEngine(model, tokenizer, config, loaded_as, digest)
    logger.info("loaded %s on %s in %s", config.teacher_name, device, loaded_as)
    return engine


def load_first_layers(config: ServeConfig, layers: int, dtype: DtypeName) -> tuple[HFEngine, PreTrainedConfig]:
    """Load the model's first layers on the CPU; returns them and the configuration of the whole model.

    They are the reference for another engine's tokens, keys and values. `info` has the identity of the whole model.

    Raises:
        FieldError, UnsupportedModelError: as in `load`.
    """
    directory = model_directory(config.model, config.revision, config.trust_remote_code)
    weight_files(directory)
    whole = _load_config(directory, config)
    model = _load_model(directory, config, torch.device("cpu"), DTYPES[dtype], layers)
    digest = weights_digest(directory, whole.to_dict(), dtype)
    return HFEngine(model, _load_tokenizer(directory, config), config, dtype, digest), whole


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


def _load_tokenizer(directory: Path, config: ServeConfig) -> PreTrainedTokenizerBase:
    # Without tokenizer files, transformers creates an empty tokenizer for some models.
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise FieldError("model", f"'{config.model}' has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise FieldError("model", f"the tokenizer of '{config.model}' cannot be loaded: {error}") from error


def _load_config(directory: Path, config: ServeConfig) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise FieldError("model", f"the configuration of '{config.model}' cannot be read: {error}") from error


def _load_model(
    directory: Path, config: ServeConfig, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": ATTENTION_NAME,
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if device.type == "cuda":
        # Load straight to the GPU, so that the model need not fit into host memory.
        options["device_map"] = {"": device}
    if config.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    options["config"] = model_config = _load_config(directory, config)
    if layers is not None:
        text_config = model_config.get_text_config()
        text_config.num_hidden_layers = min(layers, text_config.num_hidden_layers)
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:layers]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(directory, **options)
    except ValueError as error:
        raise UnsupportedModelError(f"'{config.model}': {error}") from error
    except (OSError, SafetensorError, ImportError, RuntimeError) as error:
        raise FieldError("model", f"the weights of '{config.model}' cannot be loaded: {error}") from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    # transformers initialises weights that a checkpoint lacks with random values.
    prefix = f"{model.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if name.startswith(prefix))
    if len(missing) < len(report["missing_keys"]):
        # The head is missing and would be random: mark the model as unable to generate, as transformers does.
        model.generation_config = None  # pyright: ignore[reportAttributeAccessIssue]
    if missing:
        raise FieldError("model", f"the checkpoint of '{config.model}' lacks {len(missing)} weights: {missing[0]}, ...")
    return model.eval().requires_grad_(False)


def _base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; logits are not needed."""
    base = model.base_model
    if base is model or not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} has no base model that runs without a head")
    return base


def _max_sample_tokens(requested: int | None, text_config: Any) -> int:
    context = cast("int | None", getattr(text_config, "max_position_embeddings", None))
    rope = cast("dict[str, Any]", getattr(text_config, "rope_parameters", None) or {})
    if rope.get("rope_type") == "longrope":
        # Beyond this length, the longest sample of a batch would change the rotary frequencies of all others.
        context = int(rope["original_max_position_embeddings"])
    if context is None and requested is None:
        raise FieldError("max_sample_tokens", "the model states no context length, so this must be set")
    if context is not None and requested is not None and requested > context:
        raise FieldError("max_sample_tokens", f"got {requested}; the model takes at most {context} tokens")
    return cast("int", requested or context)
