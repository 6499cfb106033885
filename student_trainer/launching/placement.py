"""Decides which nodes train, and which node serves each teacher. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the job.

    Attributes:
        name: the scheduler's name for it.
        address: where other nodes reach it.
        component: the number of its component in a heterogeneous job, otherwise 0.
    """

    name: str
    address: str
    component: int = 0


@dataclass(frozen=True, slots=True)
class ServerPlacement:
    """The node and the device of one server."""

    node: Node
    device: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The nodes of all processes of a job.

    Attributes:
        trainers: nodes of the ranks.
        ranks_per_node: ranks on each of them.
        gpus: GPUs of each training node that the ranks use, or None for all.
        teachers: each teacher's servers.
    """

    trainers: tuple[Node, ...]
    ranks_per_node: int
    gpus: tuple[int, ...] | None = None
    teachers: Mapping[str, tuple[ServerPlacement, ...]] = field(default_factory=dict)


def lay_out(
    nodes: Sequence[Node], gpus: int, teachers: Sequence[str], *, replicas: int = 1, ranks_per_node: int | None = None
) -> Placement:
    """Places ranks on the first nodes and servers on the last, each server on its own node if there are enough nodes.

    Args:
        nodes: all nodes of the job; the job's script runs on the first.
        gpus: GPUs of each node; 0 runs everything on CPUs. A server takes one.
        teachers: names of the teachers; empty if the K/V come from a store.
        replicas: servers per teacher.
        ranks_per_node: training processes per node; one per free GPU by default.

    Raises:
        ConfigError: there are too few GPUs.
    """
    servers = [name for _ in range(replicas) for name in teachers]
    apart = min(len(servers), len(nodes) - 1)
    trainers, serving = nodes[: len(nodes) - apart], nodes[len(nodes) - apart :] or nodes
    # On a single node the servers take the last GPUs.
    first = gpus - len(servers) if not apart else 0
    taken = dict.fromkeys(serving, first)
    placements: dict[str, list[ServerPlacement]] = {name: [] for name in teachers}
    for index, name in enumerate(servers):
        node = serving[index % len(serving)]
        placements[name].append(ServerPlacement(node, f"cuda:{taken[node]}" if gpus else "cpu"))
        taken[node] += 1
    shared = bool(servers) and not apart
    if gpus and (max(taken.values()) > gpus or (shared and first < 1)):
        raise ConfigError(
            f"{len(servers)} servers and the training do not fit on {len(nodes)} nodes with {gpus} GPUs each; a server "
            f"takes one GPU: ask for {len(servers) + 1} nodes (sbatch --nodes), or more GPUs on each"
        )
    training = tuple(range(first)) if gpus and shared else None
    ranks = ranks_per_node or (len(training) if training else gpus) or 1
    return Placement(tuple(trainers), ranks, training, {name: tuple(found) for name, found in placements.items()})
