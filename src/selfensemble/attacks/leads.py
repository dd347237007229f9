"""What noise draws say of an attack: who leads, and whether that is sure."""

import math

import torch
from torch import Tensor


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in float64, where the device has it: logits may be almost alike."""
    return wide(logits).softmax(dim=-1)


def wide(logits: Tensor) -> Tensor:
    """The same numbers in float64, where the device has it."""
    return logits.double() if logits.device.type in ("cpu", "cuda") else logits


def check_answers(outputs: Tensor) -> None:
    """Raise where a model has no answer.

    Raises:
        ValueError: outputs are NaN; the message says what to do.
    """
    if outputs.isnan().any():
        raise ValueError(
            "the model returns NaN, for its logits or their gradient, at an image that the attack has "
            "reached, so nobody can say which class it answers with: fix the model (a division by 0, the "
            "root or the logarithm of 0, an overflow in half precision)"
        )


def mean_log(each: Tensor) -> Tensor:
    """Log of the mean softmax (B, K), in float64 as there, from the logits of single draws (N, B, K)."""
    return wide(each).log_softmax(dim=2).logsumexp(dim=0) - math.log(len(each))


def lead_of(each: Tensor, labels: Tensor, targeted: bool, errors: float) -> tuple[Tensor, Tensor]:
    """(B,) the lead of an attack in the mean of independent draws (N, B, K), and whether it is sure."""
    check_answers(each)
    mean = each.mean(dim=0)
    rival = mean.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    image = torch.arange(len(labels), device=labels.device)
    leads = each[:, image, rival] - each[:, image, labels]
    leads = -leads if targeted else leads
    lead, success = leads.mean(dim=0), fooled(mean, labels, targeted)
    if errors and len(each) > 1:
        success &= lead > errors * leads.std(dim=0) / math.sqrt(len(each))
    return lead.float(), success


def side_of(each: Tensor, labels: Tensor, targeted: bool, errors: float) -> Tensor:
    """(B,) 1, -1 or 0, see `Oracle.side`, from the softmax of independent draws (N, B, K)."""
    won = lead_of(each, labels, targeted, errors)[1]
    lost = lead_of(each, labels, not targeted, errors)[1]
    return won.float() - lost.float()


def fooled(probabilities: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """(B,) whether the largest probability is what the attack wants."""
    answers = probabilities.argmax(dim=1)
    wanted = answers == labels if targeted else answers != labels
    return wanted & ~probabilities.isnan().any(dim=1)
