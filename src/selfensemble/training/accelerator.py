"""The accelerator of a training run, by Hugging Face Accelerate."""

import torch

from ..runtime.devices import has_bfloat16
from ..runtime.packages import needs
from ..runtime.processes import check_restarts

with needs("selfensemble[train]"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState


def accelerator_of(precision: str) -> Accelerator:
    """Of this process, for training in a precision; in float32 where bfloat16 would only be imitated."""
    if precision == "bf16" and not torch.accelerator.is_available() and not has_bfloat16(torch.device("cpu")):
        precision = "no"
    # A second run in one process may want another precision than the first; a teacher wants the same.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    check_restarts()
    # Told so, Accelerate joins the processes that torchrun starts on a machine without accelerator.
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
