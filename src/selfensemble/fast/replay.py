"""Gradients of training steps; on CUDA recorded as a graph and replayed, at the cost of their kernels alone.

A step of a small network is some hundred launches of short kernels, which take a CPU longer to ask for than
a GPU to do. The streams of the noise are those of eager steps: their generators belong to the graph, and are
seeded again before each replay.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..noise.streams import Generators, noise_draw, seed_streams_

_EAGER_STEPS = 3  # first, in which libraries choose their kernels


class StepGradients:
    """The loss of a batch, whose gradients are left with the parameters.

    Args:
        work: a batch to the loss; adds to the gradients. It draws from torch's global generator of the device
            and from the noise streams of its surroundings. To be replayed it must take the indices of images,
            on their device, and wait for the device nowhere; what Python decides then is recorded with it.
        zero_grad: sets the gradients to None.
        seed: of the noise; its draws are the numbers of the steps.
        replays: whether steps are to be recorded; then all batches have one size.
        opposite: see `noise_draw`.
    """

    def __init__(
        self,
        work: Callable[[Any], Tensor],
        zero_grad: Callable[[], None],
        seed: int,
        replays: bool,
        opposite: bool = False,
    ) -> None:
        self._opposite = opposite
        self._work, self._zero_grad, self._seed, self._replays = work, zero_grad, seed, replays
        self._generators: Generators = {}
        self._eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, index: Any, step: int, *, afresh: bool = True) -> Tensor:
        """The loss of a batch, with noise number `step`; `afresh` forgets the gradients of before."""
        if self._replays and self._graph is None and self._eager == _EAGER_STEPS:
            self._record(index)
        if self._graph is not None:
            self._index.copy_(index)
            seed_streams_(self._generators, self._seed, step)
            self._graph.replay()
            return self._loss
        self._eager += 1
        if afresh:
            self._zero_grad()
        self._generators = {}
        with noise_draw(self._seed, step, opposite=self._opposite, generators=self._generators):
            return self._work(index)

    def _record(self, index: Tensor) -> None:
        """One step as a graph, which owns the gradients from then on."""
        graph = torch.cuda.CUDAGraph()
        self._index = index.clone()
        self._generators = {(0, layer, device): each for (_, layer, device), each in self._generators.items()}
        self._zero_grad()
        stream = torch.cuda.current_stream()
        try:
            for generator in self._generators.values():
                graph.register_generator_state(generator)
            drawn = noise_draw(self._seed, 0, opposite=self._opposite, generators=self._generators)
            with torch.cuda.graph(graph), drawn:
                self._loss = self._work(self._index)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"training without a CUDA graph, which is slower: {reason}", stacklevel=2)
            self._replays = False
            torch.cuda.set_stream(stream)  # a capture that was cut short leaves its own
        else:
            self._graph = graph
