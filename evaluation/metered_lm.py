"""An lm-eval model wrapper that shows progress and counts truncated prompts and unfinished answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.model import LM
from rich.console import Console

from kvcore.monitoring.progress import Meter

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Batches per call of the model; progress is shown after each call.
_BATCHES = 4


class MeteredLM(LM):
    """Passes requests to a model in chunks, longest first, and shows progress.

    Args:
        model: a `TextLM`.
        name: dataset name for progress.
        console: where the progress bar is drawn; if it is not a terminal, progress is logged.

    Attributes:
        unfinished: the prompts so far whose answer was cut off at the maximum number of tokens.
    """

    def __init__(self, model: Any, name: str, console: Console | None = None) -> None:
        super().__init__()
        self._model, self._name = model, name
        self._console = console
        self._truncated: set[str] = set()
        self.unfinished: set[str] = set()

    @property
    def truncated(self) -> int:
        """Number of prompts so far that were truncated at the start to fit the context."""
        return len(self._truncated)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates continuations; notes prompts that are truncated to leave room, and those without a whole answer."""
        for request in requests:
            context, settings = cast("tuple[str, dict[str, Any]]", request.args)
            room = self._model.max_length - settings["max_gen_toks"]
            if len(self._model.prompt_ids(context)) > room:
                self._truncated.add(context)
        answers = self._in_chunks(self._model.write, requests)
        self.unfinished |= {
            cast("str", request.args[0])
            for request, answer in zip(requests, answers, strict=True)
            if not answer.finished
        }
        return [answer.text for answer in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; counts prompts that are too long with their continuation."""
        for request in requests:
            tokens = sum(map(len, self._model._encode_pair(*request.args)))  # noqa: SLF001 - the tokens that lm-eval itself reads
            if tokens > self._model.max_length + 1:
                self._truncated.add(cast("str", request.args[0]))
        return self._in_chunks(partial(self._model.loglikelihood, disable_tqdm=True), requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihoods of whole texts."""
        return self._in_chunks(partial(self._model.loglikelihood_rolling, disable_tqdm=True), requests)

    def _in_chunks(self, ask: Callable[..., list[Any]], requests: Sequence[Instance]) -> list[Any]:
        # Requests with the same prompt stay together, so that a model can process it once.
        order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].args[0]), requests[index].args[0]))
        results: list[Any] = [None] * len(requests)
        chunk = _BATCHES * self._model.batch_size
        with Meter({self._name: len(requests)}, self._console) as meter:
            for start in range(0, len(order), chunk):
                indices = order[start : start + chunk]
                answers = ask([requests[index] for index in indices])
                for index, answer in zip(indices, answers, strict=True):
                    results[index] = answer
                meter.advance(self._name, len(indices))
        return results
