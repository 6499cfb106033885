"""A model whose requests are counted: progress with the remaining time, and prompts that were too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.model import LM
from rich.console import Console

from kvcore.monitoring.progress import Meter

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Batches that the model is handed at once: progress shows after each such share.
_BATCHES = 4


class WatchedLM(LM):
    """Hands a model its requests in shares, the longest first, and counts them.

    Args:
        model: a model of lm-eval's `HFLM` kind.
        name: what progress calls the dataset.
        console: where a bar is drawn; where it is no terminal, lines go to the log instead.
    """

    def __init__(self, model: Any, name: str, console: Console | None = None) -> None:
        super().__init__()
        self._model, self._name = model, name
        self._console = console
        self._truncated: set[str] = set()

    @property
    def truncated(self) -> int:
        """How many prompts lost their beginning so far, as the model reads no more."""
        return len(self._truncated)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations; a prompt that leaves no room for the answer loses its beginning, and is counted."""
        for request in requests:
            context, settings = cast("tuple[str, dict[str, Any]]", request.args)
            room = self._model.max_length - settings["max_gen_toks"]
            if len(self._model.tok_encode(context)) > room:
                self._truncated.add(context)
        return self._in_shares(self._model.generate_until, requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; prompts that are too long with theirs are counted."""
        for request in requests:
            tokens = sum(map(len, self._model._encode_pair(*request.args)))  # noqa: SLF001 - what lm-eval itself reads
            if tokens > self._model.max_length + 1:
                self._truncated.add(cast("str", request.args[0]))
        return self._in_shares(self._model.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihoods of texts as they stand."""
        return self._in_shares(self._model.loglikelihood_rolling, requests)

    def _in_shares(self, ask: Callable[..., list[Any]], requests: Sequence[Instance]) -> list[Any]:
        # Requests with the same prompt stay together: a model may read it once for all.
        order = sorted(range(len(requests)), key=lambda place: (-len(requests[place].args[0]), requests[place].args[0]))
        results: list[Any] = [None] * len(requests)
        share = _BATCHES * self._model.batch_size
        with Meter({self._name: len(requests)}, self._console) as meter:
            for start in range(0, len(order), share):
                places = order[start : start + share]
                answers = ask([requests[place] for place in places], disable_tqdm=True)
                for place, answer in zip(places, answers, strict=True):
                    results[place] = answer
                meter.advance(self._name, len(places))
        return results
