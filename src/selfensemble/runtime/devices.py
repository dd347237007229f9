"""Devices by their names."""

from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    import torch


def device_named(name: str) -> "torch.device":
    """The device of that name; "auto" is an accelerator if there is one.

    Raises:
        InputError: the device cannot be used here.
    """
    import torch

    if name == "auto":
        # Not what torch was built for, but what is here.
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        (torch.ones(1, dtype=torch.float32, device=device) + 1).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise InputError(
            f"there is no device {name!r} here that torch can use: pass one of {here}"
        ) from error
    return device


def has_bfloat16(device: "torch.device") -> bool:
    """Whether the device has bfloat16 arithmetic; processors without imitate it, far slower than float32."""
    import torch

    if device.type != "cpu":
        return True
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or bool(asked())
