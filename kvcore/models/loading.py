"""Loads models and tokenizers from a directory or the hub, for training, evaluation and serving alike."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

from kvcore.errors import FieldError, UnsupportedModelError
from kvcore.models.backbone import ignore_latents, read_config
from kvcore.models.files import check_files, model_config, model_directory
from kvcore.models.kinds import check_kind
from kvcore.models.latent_folder import check_not_latent, is_latent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on disk. `find_model` makes it.

    Attributes:
        name: the directory or hub id, as the user wrote it.
        field: the field of `name` in errors.
        directory: where the files are.
        trust_remote_code: whether to run Python code that comes with the model. None: that cannot be allowed.
        latent: whether it is a latent student; configuration and weights are those of its backbone.
    """

    name: str
    field: str
    directory: Path
    trust_remote_code: bool | None = None
    latent: bool = False

    def config(self) -> PreTrainedConfig:
        """The model's configuration.

        Raises:
            FieldError: it cannot be read, or needs code that comes with the model.
        """
        try:
            return read_config(self.directory, trust_remote_code=bool(self.trust_remote_code))
        except (OSError, ValueError) as error:
            raise self._refused("the configuration", "read", error) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            FieldError: it cannot be loaded, or needs code that comes with the model.
        """
        # Without its configuration, transformers would guess one and warn.
        options = {"config": self.config()} if self.latent else {}
        try:
            return _transformers("AutoTokenizer").from_pretrained(
                self.directory, trust_remote_code=bool(self.trust_remote_code), **options
            )
        except Exception as error:  # The tokenizers library raises nothing more specific.
            raise self._refused("the tokenizer", "loaded", error) from error

    def causal_lm(
        self, config: PreTrainedConfig, *, head_optional: bool = False, all_layers: bool = True, **options: Any
    ) -> PreTrainedModel:
        """The model, with all its weights from the directory.

        Args:
            config: its configuration.
            head_optional: accept a model without language-model head; it is then marked as unable to generate.
            all_layers: False if `config` has fewer layers than the directory.
            options: more arguments of transformers' `from_pretrained`.

        Raises:
            FieldError: weights are damaged, missing, or do not belong to the model.
            UnsupportedModelError: it does not support the options.
        """
        if self.latent:
            ignore_latents(config)
        try:
            loaded = _transformers("AutoModelForCausalLM").from_pretrained(
                self.directory,
                config=config,
                trust_remote_code=bool(self.trust_remote_code),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except ValueError as error:
            raise UnsupportedModelError(f"'{self.name}': {_one_line(error)}") from error
        except (OSError, SafetensorError, ImportError, RuntimeError) as error:
            raise self._refused("the weights", "loaded", error) from error
        model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
        self._check_names(model, report, head_optional=head_optional, all_layers=all_layers)
        return model

    def _check_names(
        self, model: PreTrainedModel, report: dict[str, Any], *, head_optional: bool, all_layers: bool
    ) -> None:
        """Checks that weights on disk and in the model are the same; transformers makes up what is missing."""
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        prefix = f"{model.base_model_prefix}."
        if head_optional and any(not name.startswith(prefix) for name in missing):
            # The head would be random: mark the model as unable to generate, as transformers does.
            model.generation_config = None  # pyright: ignore[reportAttributeAccessIssue]
            missing, unexpected = ([n for n in names if n.startswith(prefix)] for names in (missing, unexpected))
        step = "copy or download the model again, or save it with the library that wrote it"
        if missing:
            raise FieldError(
                self.field, f"the checkpoint of '{self.name}' lacks {len(missing)} weights: {missing[0]}, ...; {step}"
            )
        if unexpected and all_layers:
            kind = type(model).__name__
            raise FieldError(
                self.field,
                f"the checkpoint of '{self.name}' has {len(unexpected)} weights that {kind} does not have: "
                f"{unexpected[0]}, ...; {step}, and if it is quantised, give the original model",
            )

    def _refused(self, part: str, action: str, error: Exception) -> FieldError:
        reason = _one_line(error)
        if "trust_remote_code" in reason and not self.trust_remote_code:
            step = (
                "choose a model of an architecture that transformers has itself, since trust_remote_code is not "
                "supported here"
                if self.trust_remote_code is None
                else "read that code, and if you trust it, pass --trust-remote-code"
            )
            return FieldError(self.field, f"{part} of '{self.name}' needs Python code that comes with it; {step}")
        return FieldError(self.field, f"{part} of '{self.name}' cannot be {action}: {reason}")


def find_model(
    name: str,
    field: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    latents_apart: bool = False,
) -> ModelSource:
    """Finds a model in a directory or on the hub, and checks that its files are whole.

    Args:
        name: the directory or hub id, as the user wrote it.
        field: the field of `name` in errors.
        revision: of the hub's repository; None for its main branch.
        trust_remote_code: whether to run Python code that comes with the model. None: that cannot be allowed.
        latents_apart: accept a latent student, whose latents the caller reads; otherwise it is refused.

    Raises:
        FieldError: there is no such model, a file is missing or damaged, or it is a latent student.
    """
    directory = model_directory(name, field, revision=revision, with_code=bool(trust_remote_code))
    tree = model_config(directory, name, field)
    if not latents_apart:
        check_not_latent(tree, name, field)
    check_kind(directory, name, field)
    check_files(directory, field)
    return ModelSource(name, field, directory, trust_remote_code, is_latent(tree))


def check_vocabulary(source: ModelSource, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Checks that the embedding has a row for every token of the tokenizer.

    Special tokens that no text contains by itself may lack one: Gemma 3 1B has a token for images, and transformers
    adds an unknown token to vocabularies of bytes.

    Raises:
        FieldError: a token has none.
    """
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.num_embeddings)
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - set(named)
    if bad := {token: index for token, index in beyond.items() if index not in special}:
        token, index = max(bad.items(), key=lambda item: item[1])
        raise FieldError(
            source.field,
            f"the tokenizer of '{source.name}' has token ids up to {index} ({token!r}), but the model's embedding has "
            f"{rows} rows; give the tokenizer that belongs to the model, or resize the model's embedding and train it",
        )
    if unusable := sorted(token for token in beyond if token != tokenizer.unk_token):
        logger.warning("'%s': texts must not contain %s: the model has no embedding for it", source.name, unusable)


def _transformers(name: str) -> Any:
    import transformers  # noqa: PLC0415 - slow to import

    return getattr(transformers, name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
