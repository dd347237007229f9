"""Decoding within limits: large images one at a time, in their own thread, so that small ones pass them.

Requests with large images come one after the other, the first that came first: if they took turns, of many at
once none would be answered in time.

A thread cannot be stopped in the middle of an image. What an image costs is known from its header, and is
limited; between two images it is looked whether anybody still waits.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from time import monotonic
from typing import TypeVar

from torch import Tensor

from .images import ImageError, TooLargeError, cost_of, decode_base64, open_image

_SMALL = 2**20  # pixels; a flat PNG of as many takes 30 ms
_TURN = 0.02  # seconds that small images of one request may take before those of others come
_TOGETHER = 8  # times the pixels of the largest image may the images of a request have together

_Found = TypeVar("_Found")


class Opener:
    """Opens the images of many requests.

    Args:
        shape: (channels, height, width) of what the network takes.
        max_pixels: of an image as it is sent; of all images of a request, eight times as many.
        centre: side of the central part of an image that is looked at, as a share.
    """

    def __init__(self, shape: tuple[int, int, int], max_pixels: int, centre: float = 1.0) -> None:
        self.shape, self.max_pixels, self.centre = shape, max_pixels, centre
        self._small, self._large = (
            ThreadPoolExecutor(1, thread_name_prefix=f"selfensemble-{name}") for name in ("small", "large")
        )
        self._turn = asyncio.Lock()  # of requests with large images, in the order in which they ask

    def close(self) -> None:
        """Begin with no other image."""
        for lane in (self._small, self._large):
            lane.shutdown(wait=False, cancel_futures=True)

    async def open(self, files: list[bytes] | list[str]) -> list[Tensor]:
        """(C, H, W) uint8 of each of some files, or of their base64.

        Raises:
            TooLargeError, ImageError: the first that cannot be taken, by its place.
        """
        loop = asyncio.get_running_loop()
        read, costs = await loop.run_in_executor(self._small, self._measure, files)
        if sum(costs) > _TOGETHER * self.max_pixels:
            raise TooLargeError(
                f"the images have {sum(costs):,} pixels together, at most {_TOGETHER * self.max_pixels:,} "
                "are taken in one request: send fewer"
            )
        opened: list[Tensor] = []
        async with AsyncExitStack() as turn:
            is_mine = False
            while len(opened) < len(read):
                lane = self._small
                if costs[len(opened)] > _SMALL:
                    lane = self._large
                    if not is_mine:
                        await turn.enter_async_context(self._turn)
                        is_mine = True
                opened += await loop.run_in_executor(lane, self._some, read, costs, len(opened))
        return opened

    def _measure(self, files: list[bytes] | list[str]) -> tuple[list[bytes], list[int]]:
        read = [_placed(place, _bytes, each) for place, each in enumerate(files)]
        return read, [_placed(place, cost_of, data, self.max_pixels) for place, data in enumerate(read)]

    def _some(self, files: list[bytes], costs: list[int], first: int) -> list[Tensor]:
        """From number `first` on: one large image, or small ones while they take no time to speak of."""
        began, found = monotonic(), []
        for place in range(first, len(files)):
            if place > first and (costs[place] > _SMALL or monotonic() - began > _TURN):
                break
            known = self.shape, self.max_pixels, self.centre
            found.append(_placed(place, open_image, files[place], *known))
            if costs[place] > _SMALL:
                break
        return found


def _bytes(file: bytes | str) -> bytes:
    return decode_base64(file) if isinstance(file, str) else file


def _placed(place: int, work: Callable[..., _Found], *arguments: object) -> _Found:
    """What `work` returns; its errors say which image they are about."""
    try:
        return work(*arguments)
    except ImageError as error:
        raise type(error)(f"image {place}: {error}") from None
