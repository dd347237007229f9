"""Processes that share one run: those that torchrun or accelerate launch starts."""

import datetime
import os
from typing import TYPE_CHECKING

from .devices import device_named
from .packages import needs

if TYPE_CHECKING:
    import torch


def this_process(name: str) -> tuple[int, int, "torch.device"]:
    """Rank, number of processes and device of this one.

    Args:
        name: the device wanted, or "auto".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, device_named(name)
    check_restarts()
    with needs("selfensemble[train]"):
        from accelerate import PartialState

    device = device_named(name)
    # Shards take as long as they take: nobody gives up waiting for the others.
    state = PartialState(cpu=device.type == "cpu", timeout=datetime.timedelta(days=7))
    return state.process_index, state.num_processes, state.device


def wait_for_all(world: int) -> None:
    """Wait for all `world` processes of a run."""
    if world > 1:
        with needs("selfensemble[train]"):
            from accelerate import PartialState

        PartialState().wait_for_everyone()


def check_restarts() -> None:
    """Refuse restarts under which processes read the addresses that those before them left behind.

    Their launcher's store outlives a restart and keys do not say which attempt they are of, so that processes
    now and then connect to nobody and wait forever (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        ValueError: the launcher may restart processes and shares its store with them.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the launcher's environment: without it "
            "processes started again may wait for those before them forever"
        )
