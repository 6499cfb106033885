"""Which node trains and which serves whom. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the job: its name for the scheduler, and the address that the others reach it at."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class ServerPlacement:
    """Where one server runs."""

    node: Node
    device: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Who runs where. `gpus`: those of each training node that ranks use, or None for all of them."""

    trainers: tuple[Node, ...]
    ranks_per_node: int
    gpus: tuple[int, ...] | None
    teachers: Mapping[str, tuple[ServerPlacement, ...]]


def lay_out(
    nodes: Sequence[Node], gpus: int, teachers: Sequence[str], *, replicas: int = 1, ranks_per_node: int | None = None
) -> Placement:
    """Ranks on the first nodes, servers on the last: each on its own node as far as there are nodes, one GPU each.

    Args:
        nodes: of the job; the first one is where the job's script runs.
        gpus: of each node; 0: everything runs on CPUs.
        teachers: names; none where K/V come from a store.
        replicas: servers of each teacher.
        ranks_per_node: training processes; by default one for each GPU that trains.

    Raises:
        ConfigError: there are too few GPUs.
    """
    servers = [name for _ in range(replicas) for name in teachers]
    apart = min(len(servers), len(nodes) - 1)
    trainers, serving = nodes[: len(nodes) - apart], nodes[len(nodes) - apart :] or nodes
    # On a single node servers take the last GPUs.
    first = gpus - len(servers) if not apart else 0
    taken = dict.fromkeys(serving, first)
    seats: dict[str, list[ServerPlacement]] = {name: [] for name in teachers}
    for index, name in enumerate(servers):
        node = serving[index % len(serving)]
        seats[name].append(ServerPlacement(node, f"cuda:{taken[node]}" if gpus else "cpu"))
        taken[node] += 1
    shared = bool(servers) and not apart
    if gpus and (max(taken.values()) > gpus or (shared and first < 1)):
        raise ConfigError(
            f"{len(servers)} servers and the training do not fit on {len(nodes)} nodes with {gpus} GPUs each; a server "
            f"takes one GPU: ask for {len(servers) + 1} nodes (sbatch --nodes), or more GPUs on each"
        )
    training = tuple(range(first)) if gpus and shared else None
    ranks = ranks_per_node or (len(training) if training else gpus) or 1
    return Placement(tuple(trainers), ranks, training, {name: tuple(found) for name, found in seats.items()})
