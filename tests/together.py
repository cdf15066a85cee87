"""Several processes that work together, as torchrun starts them, for tests."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from optin_deploy.distributed.ranks import Ranks

Work = Callable[[Ranks], dict[str, Tensor]]

_SECONDS = 120


def together(work: Work, world: int, folder: Path) -> list[dict[str, Tensor]]:
    """What ``work`` gives each of ``world`` processes, forked so that they import nothing anew."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("processes cannot be forked here")
    context = multiprocessing.get_context("fork")
    members = [context.Process(target=_member, args=(work, rank, world, folder)) for rank in range(world)]
    for member in members:
        member.start()
    for member in members:
        member.join(_SECONDS)
    ended = [member.exitcode for member in members]
    for member in members:
        member.kill()
    assert ended == [0] * world
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


def _member(work: Work, rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = work(Ranks(rank, world))
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
