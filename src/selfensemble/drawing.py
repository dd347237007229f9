"""Mean and spread of the softmax over noise draws; images leave as they are settled."""

from collections.abc import Callable

import torch
from torch import Tensor

from .stopping import Rule

# Of images, the number of the part they are, the first draw and how many, to (count, B, K) softmax outputs.
Draw = Callable[[Tensor, int, int, int], Tensor]


def moments(draw: Draw, inputs: Tensor, rule: Rule, size: int, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation over the draws, and how many draws each image took.

    Args:
        draw: several draws at once.
        inputs: (B, ...).
        rule: when an image stops.
        size: images a pass.
        fold: where there are fewer images than this, a pass takes several draws of them, up to so many
            images; what the rule then does not want is thrown away. 1 takes one draw at a time.

    Returns:
        (B, K), (B, K) and (B,) int64, where `inputs` are.
    """
    active = torch.arange(len(inputs), device=inputs.device)
    used = torch.zeros_like(active)
    mean = squares = torch.empty(0)
    index = 0
    while index < rule.most:
        count = min(rule.most - index, max(1, fold // max(1, len(active))))
        parts = (inputs if len(active) == len(inputs) else inputs[active]).split(size)
        passes = [draw(part, number, index, count) for number, part in enumerate(parts)]
        outputs = torch.cat(passes, dim=1)
        if index == 0:
            mean, squares = outputs.new_zeros((2, *outputs.shape[1:]))
        for later in range(count):
            index += 1
            # Welford's recurrence.
            step = outputs[later] - mean[active]
            mean[active] += step / index
            squares[active] += step * (outputs[later] - mean[active])
            used[active] = index
            if index < rule.most and (settled := rule.settled(mean[active], index)).any():
                active, outputs = active[~settled], outputs[:, ~settled]
        if len(active) == 0:
            break
    return mean, (squares / (used - 1).unsqueeze(1)).sqrt(), used
