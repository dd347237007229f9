"""Outputs that are no logits of two classes or more for each input are refused, by all that read them."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import apgd, cw_l2, fab, pgd, random_noise, square, transfer
from selfensemble.ensemble.checks import OutputError, logits_of
from selfensemble.ensemble.stopping import Fixed
from selfensemble.evaluation import doctor
from selfensemble.evaluation.adapters import LibraryAttack
from selfensemble.fast.optimize import optimize
from selfensemble.serving.batching import Batcher


class Returning(nn.Module):
    """A convolutional network whose five logits an image pass through a function."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 5, 3), last

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.conv(inputs).mean(dim=(2, 3)))


def halved(logits: Tensor) -> Tensor:
    return logits[: len(logits) // 2]


# What the network makes of its logits (B, 5), and what the error says besides the shape.
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one column": (lambda z: z[:, :1], "torch.stack([torch.zeros_like(z), z], dim=1)"),
    "one number": (lambda z: z[:, 0], "torch.stack([torch.zeros_like(z), z], dim=1)"),
    "one number, (B, 1, 1, 1)": (lambda z: z[:, :1, None, None], "torch.zeros_like(z)"),
    "no column": (lambda z: z[:, :0], "got shape (6, 0)"),
    "(B, K, 1, 1)": (lambda z: z[:, :, None, None], "logits.flatten(1)"),
    "(B, 1, K)": (lambda z: z[:, None], "logits.flatten(1)"),
    "(B, 1, K, 1)": (lambda z: z[:, None, :, None], "logits.flatten(1)"),
    "(B, K, H, W)": (lambda z: z[:, :, None, None].expand(-1, -1, 2, 3), "wrap it"),
    "a scalar": (lambda z: z.mean(), "wrap it"),
    "fewer rows": (halved, "inputs: each needs a row"),
    "more rows": (lambda z: torch.cat([z, z]), "inputs: each needs a row"),
    "one row": (lambda z: z.mean(dim=0, keepdim=True), "inputs: each needs a row"),
    "integers": (lambda z: (100 * z).round().to(torch.int64), "floating-point logits"),
    "votes": (lambda z: nn.functional.one_hot(z.argmax(dim=1), 5), "floating-point logits"),
    "booleans": (lambda z: z > 0, "floating-point logits"),
    "complex": (lambda z: z.to(torch.complex64), "floating-point logits"),
    "a list": (lambda z: [z], "got list"),
    "nothing": (lambda z: None, "got NoneType"),
}
LABELS = torch.tensor([0, 1, 0, 0, 1, 0])


def served(model: nn.Module, inputs: Tensor) -> None:
    with Batcher(rse.SelfEnsemble(model).eval(), inputs[:1], most_waiting=10) as batcher:
        for future in batcher.submit(inputs, Fixed(4)):
            future.result(20)


# Everything that reads what a network returns, of an ensemble or a plain network.
READERS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "predict": lambda model, inputs: rse.SelfEnsemble(model).predict(inputs),
    "predict_proba, stopping": lambda model, inputs: rse.SelfEnsemble(model).predict_proba(
        inputs, stop="exact"
    ),
    "forward in eval mode": lambda model, inputs: rse.SelfEnsemble(model).eval()(inputs),
    "forward in train mode": lambda model, inputs: rse.SelfEnsemble(model).train()(inputs),
    "without noise": lambda model, inputs: rse.SelfEnsemble(model, rse.NoiseConfig(0, 0)).predict(inputs),
    "certify": lambda model, inputs: rse.certify(rse.SelfEnsemble(model), inputs, n0=4, n=8),
    "decide": lambda model, inputs: rse.decide(rse.SelfEnsemble(model), inputs),
    "calibrate": lambda model, inputs: rse.calibrate(rse.SelfEnsemble(model), inputs.repeat(40, 1, 1, 1)),
    "conformal_sets": lambda model, inputs: rse.conformal_sets(
        rse.SelfEnsemble(model), inputs, LABELS, alpha=0.4
    ),
    "judge": lambda model, inputs: rse.judge(model, inputs, inputs, LABELS),
    "judge an ensemble": lambda model, inputs: rse.judge(rse.SelfEnsemble(model), inputs, inputs, LABELS),
    "pgd": lambda model, inputs: pgd(model, inputs, LABELS, eps=0.1, steps=1),
    "apgd": lambda model, inputs: apgd(rse.SelfEnsemble(model), inputs, LABELS, eps=0.1, steps=2),
    "square": lambda model, inputs: square(model, inputs, LABELS, eps=0.1, queries=2),
    "random_noise": lambda model, inputs: random_noise(model, inputs, LABELS, eps=0.1),
    "cw_l2": lambda model, inputs: cw_l2(rse.SelfEnsemble(model), inputs, LABELS, steps=1),
    "fab": lambda model, inputs: fab(model, inputs, LABELS, steps=1),
    "optimize": lambda model, inputs: optimize(rse.SelfEnsemble(model), inputs).predict(inputs),
    "serving": served,
    "transfer": lambda model, inputs: transfer(model, inputs, LABELS, surrogate=model, eps=0.1, steps=2),
    "an attack of another library": lambda model, inputs: LibraryAttack(
        "a library", "an attack", {}, lambda classifier, x, *_: x + 0 * classifier(x).sum()
    )(model, inputs, LABELS),
}


@pytest.mark.parametrize("reader", READERS)
def test_one_column_is_not_answered_with_certainty(images: Tensor, reader: str) -> None:
    """Its softmax is 1 whatever the image: label 0, no spread, and any radius."""
    last, text = WRONG["one column"]
    with pytest.raises(OutputError, match=re.escape(text)):
        READERS[reader](Returning(last), images)


def test_the_doctor_passes_no_check_of_one_column(images: Tensor) -> None:
    found = doctor(Returning(WRONG["one column"][0]).eval(), images, LABELS)
    assert [check.name for check in found if check.passed] == ["eval mode"]
    assert any("torch.zeros_like(z)" in (check.advice or "") for check in found)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("reader", ["predict", "forward in train mode", "judge", "pgd", "without noise"])
def test_outputs_are_never_guessed_at(images: Tensor, reader: str, wrong: str) -> None:
    last, text = WRONG[wrong]
    # Whether a network without noise is random is asked of two images.
    with pytest.raises(OutputError, match=re.escape(text).replace(r"\(6,", r"\([246],")):
        READERS[reader](Returning(last), images)


@pytest.mark.parametrize("wrong", WRONG)
def test_validate_reports_them(images: Tensor, wrong: str) -> None:
    last, text = WRONG[wrong]
    (issue,) = rse.validate(Returning(last), images)
    assert (issue.rule, issue.severity) == ("output", "error")
    assert text in issue.message


def test_what_the_errors_say_works(images: Tensor) -> None:
    """One number becomes two columns whose softmax is its sigmoid; flattened logits are logits."""

    def two(logits: Tensor) -> Tensor:
        z = logits[:, 0]
        return torch.stack([torch.zeros_like(z), z], dim=1)

    plain = Returning(lambda z: z[:, 0])
    model = Returning(two)
    model.load_state_dict(plain.state_dict())
    ensemble = rse.SelfEnsemble(model, rse.NoiseConfig(0, 0))
    torch.testing.assert_close(ensemble.predict_proba(images)[:, 1], plain(images).sigmoid())
    flat = Returning(lambda z: z[:, :, None, None].flatten(1))
    assert rse.SelfEnsemble(flat).predict_proba(images).shape == (6, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_logits_of_any_precision_and_in_objects_are_taken(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 2, dtype=dtype)

    class Output:
        pass

    output: Any = Output()
    output.logits = logits
    assert logits_of(output, 3) is logits_of(logits) is logits
    assert logits_of(logits[:0], 0).shape == (0, 2)


def test_graphs_keep_their_batch_open() -> None:
    """The number of rows is not compared while a graph is recorded, which would make it a constant."""
    model = rse.SelfEnsemble(Returning(lambda z: z)).eval()
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.rand(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    assert program.module()(torch.rand(7, 3, 8, 8)).shape == (7, 5)
