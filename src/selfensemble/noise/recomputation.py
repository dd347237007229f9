"""Passes that are computed twice: by activation checkpointing, and by networks that undo their own layers.

The second time is within the backward pass, which needs the noise of the first. Whether a pass may be
repeated is seen in the stack of calls: `torch.utils.checkpoint`, and the `ctx` of an autograd function, which
is the same object in its `forward` and in its `backward`. What was drawn is kept with that, and dies with it.
"""

import sys
from types import CodeType, FrameType
from typing import Any, Literal, NamedTuple

import torch

_RECORD = "selfensemble_drawn"  # attribute of a ctx, or of a frame of a checkpoint
_CHECKPOINTS = "torch/utils/checkpoint.py"
_Kind = Literal["checkpoint", "again", "forward", "backward"]
_kinds: dict[int, tuple[CodeType, _Kind | None]] = {}  # by identity: the hash of code is slow


class Passes(NamedTuple):
    """The repeatable passes that a call is made in.

    Attributes:
        first: holders of those that run for the first time, from the inside to the outside.
        again: holder of the one that is being repeated, if any.
    """

    first: list[Any]
    again: Any


NO_PASSES = Passes([], None)


def passes() -> Passes:
    """Those of the call that asks."""
    backward = torch._C._current_graph_task_id() != -1
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if not (backward or hooked) and torch.is_grad_enabled():
        return NO_PASSES
    first: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        kind = _kind(frame.f_code)
        if kind is not None and (holder := _holder(kind, frame)) is not None:
            if kind in ("again", "backward"):
                return Passes(first, holder)
            first.append(holder)
        frame = frame.f_back
    return Passes(first, None) if first else NO_PASSES


def _kind(code: CodeType) -> _Kind | None:
    known = _kinds.get(id(code))
    if known is None:
        known = _kinds[id(code)] = (code, _kind_of(code))
    return known[1]


def _kind_of(code: CodeType) -> _Kind | None:
    name = code.co_name
    if code.co_filename.replace("\\", "/").endswith(_CHECKPOINTS):
        if name == "checkpoint":
            return "checkpoint"
        if name == "unpack_hook":
            return "again"
    if name in ("forward", "backward") and code.co_argcount and code.co_varnames[0] == "ctx":
        return "forward" if name == "forward" else "backward"
    return None


def _holder(kind: _Kind, frame: FrameType) -> Any:
    """What is the same object when the pass is repeated."""
    values = frame.f_locals
    if kind == "checkpoint":  # whose generator is suspended while the function runs
        inner = getattr(values.get("gen"), "gi_frame", None)
        return None if inner is None else inner.f_locals.get("new_frame")
    if kind == "again":
        return values.get("frame")
    ctx = values.get("ctx")
    return ctx if isinstance(ctx, torch.autograd.function.FunctionCtx) else None


def note(holders: list[Any], drawn: Any) -> None:
    """Keep what was drawn, for passes that may be repeated."""
    for holder in holders:
        if not hasattr(holder, _RECORD):
            setattr(holder, _RECORD, ([], {}))
        getattr(holder, _RECORD)[0].append(drawn)


def recall(holder: Any) -> Any:
    """What was drawn at this place of a pass that is being repeated; None where that is not known."""
    record: tuple[list[Any], dict[int, int]] = getattr(holder, _RECORD, ([], {}))
    drawn, places = record
    task = torch._C._current_graph_task_id()  # another backward pass begins anew
    place = places.get(task, 0)
    places[task] = place + 1
    return drawn[place] if place < len(drawn) else None
