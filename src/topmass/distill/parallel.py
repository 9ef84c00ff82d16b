"""Data parallelism: the processes that `torchrun` or `accelerate launch` started, or this one alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "join_world"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: Number of this process; 0 writes.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add each tensor up over the processes, in place, in one exchange."""
        if self.size == 1 or not tensors:
            return
        where = tensors[0].device
        if dist.get_backend() == "nccl" and where.type == "cpu":  # a group of somebody else's, for GPUs only
            where = torch.device("cuda", torch.cuda.current_device())
        flat = torch.cat([t.detach().flatten().to(where, torch.float32) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def share(self, value: Any) -> Any:
        """What process 0 holds."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes of this launch; a group that exists already is used and left as it is."""
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) < 2):
        yield World()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()
