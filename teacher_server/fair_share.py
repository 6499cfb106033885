"""Fair turns between callers, first between hosts, then between a host's connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

_MAX_REMEMBERED = 1024


class Caller(NamedTuple):
    """Who makes a call: a host, and one of its connections."""

    host: str
    connection: str


# The caller of the self-test.
THE_SERVER = Caller("", "")


def caller_of(peer: str) -> Caller:
    """The caller of a peer that gRPC names, such as `ipv4:10.0.0.7:41234`."""
    return Caller(peer.rpartition(":")[0], peer)


# Who waits, from the whole to its parts: a caller, or a caller and the number of its request.
Path = tuple[str | int, ...]

PathT = TypeVar("PathT", bound=Path)


class FairShare:
    """Chooses the next caller, so that waiting callers get equal amounts of work, even if their turns differ in size.

    Hosts share equally, then the connections of a host, and so on for each part of a path. All paths have equal length.
    Whoever was idle does not get more later: its use counts from the least use of those who waited meanwhile (Goyal,
    Vin, Cheng: Start-time Fair Queueing, 1996).
    """

    def __init__(self) -> None:
        # The use so far, by the beginnings of paths.
        self._used: dict[Path, float] = {}
        # The least use of those who wait, by what their paths have in common.
        self._least: dict[Path, float] = {}

    def next(self, waiting: Mapping[PathT, float]) -> PathT:
        """Returns the next caller: the one with the least use after its turn, and the first of equal ones.

        Args:
            waiting: by path, what its next turn counts for, as far as it is known. Not empty.
        """
        candidates = list(waiting)
        for depth in range(1, len(candidates[0]) + 1):
            keys = {path[:depth] for path in candidates}
            self._least[candidates[0][: depth - 1]] = min(map(self._use, keys))
            first = min(candidates, key=lambda path: self._use(path[:depth]) + waiting[path])
            candidates = [path for path in candidates if path[:depth] == first[:depth]]
        return candidates[0]

    def charge(self, path: Path, amount: float) -> None:
        """Count work that was done."""
        for depth in range(1, len(path) + 1):
            self._used[path[:depth]] = self._use(path[:depth]) + amount
        if len(self._used) > _MAX_REMEMBERED:
            self._forget()

    def use(self, path: Path) -> tuple[float, ...]:
        """What was done for each beginning of a path; comparable with that of other paths."""
        return tuple(self._use(path[:depth]) for depth in range(1, len(path) + 1))

    def _use(self, key: Path) -> float:
        return max(self._used.get(key, 0.0), self._least.get(key[:-1], 0.0))

    def _forget(self) -> None:
        """Forget the half of the paths that are least ahead of others, and the parts of those that are forgotten."""
        ahead = {key: used - self._least.get(key[:-1], 0.0) for key, used in self._used.items()}
        kept = set(sorted(ahead, key=ahead.__getitem__)[len(ahead) // 2 :])
        kept = {key for key in kept if all(key[:depth] in kept for depth in range(1, len(key)))}
        self._used = {key: used for key, used in self._used.items() if key in kept}
        self._least = {key: least for key, least in self._least.items() if not key or key in self._used}
