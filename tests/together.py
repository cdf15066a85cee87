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
# Only libraries: the fresh interpreter may see another copy of this code.
_PRELOADED = ["torch", "timm", "transformers.models.bert.modeling_bert", "safetensors.torch"]


def together(work: Work, world: int, folder: Path) -> list[dict[str, Tensor]]:
    """Return the result of ``work`` in each of ``world`` processes.

    They are forked from a fresh interpreter that has imported the libraries. A fork of the test's own process could not
    take gradients once a test has run a backward pass there.

    Args:
        work: a function at the top of its module, or a `functools.partial` of one.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("processes cannot be forked here")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    processes = [context.Process(target=_run, args=(work, rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exit_codes == [0] * world
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


def _run(work: Work, rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    tensors = work(Ranks(rank, world))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
