"""Where noise goes in a vision transformer: on its patches, in front of attention, of all linear layers.

    python benchmarks/transformer.py [--seeds 2] [--epochs 40] [--images 100] [--eps 0.5] [--out FILE]

A small transformer on the handwritten digits of the package, trained anew for each place, level and seed by
the cross-entropy of one noisy pass (AdamW, cosine). Accuracy is that of 10 draws on fresh noise, without an
attack on all 450 test images and under PGD in an L2 ball (mean probabilities of EOT draws) on the first ones.
A level is the noise on the image; inner layers have half of it, as published (0.2 and 0.1); places without
the patches have the level itself. The last table takes of each place the strongest noise that costs at most
the accuracy given.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble.attacks import pgd
from selfensemble.noise.filters import is_linear
from selfensemble.noise.injection import is_convolution

Filter = Callable[[nn.Module, str], bool]


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.before(tokens)
        parts = [
            layer(found).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(mixed)
        result: Tensor = tokens + self.mlp(self.between(tokens))
        return result


class Transformer(nn.Module):
    """Patches of 2x2 pixels of 8x8, whose only convolution makes them tokens."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width, device="cpu"))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def _is_attention(module: nn.Module, fqn: str) -> bool:
    return fqn.rpartition(".")[2] in ("query", "key", "value", "out")


# In front of what, and the noise of inner layers as a share of the level.
PLACES: dict[str, tuple[Filter, float]] = {
    "patches alone": (is_convolution, 0.0),
    "patches and attention": (lambda module, fqn: is_convolution(module) or _is_attention(module, fqn), 0.5),
    "patches and all linear layers": (lambda module, fqn: is_convolution(module) or is_linear(module), 0.5),
    "attention alone": (_is_attention, 1.0),
    "linear layers alone": (is_linear, 1.0),
}
LEVELS = {True: (0.2, 0.4), False: (0.25, 0.5)}  # with the patches, without


def trained(place: str | None, level: float, seed: int, epochs: int) -> rse.SelfEnsemble:
    """The ensemble of one place and level; None for no noise."""
    torch.manual_seed(seed)
    network = Transformer()
    chosen, share = PLACES[place or "patches alone"]
    levels = rse.NoiseConfig(level, level * share)
    data = rse.load_data("digits", "train")
    inputs, labels = data.inputs(), data.labels
    ensemble = rse.SelfEnsemble(network, levels, filter_fn=chosen, example_inputs=inputs[:2])
    adam = torch.optim.AdamW(ensemble.parameters(), lr=4e-3, weight_decay=0.05)
    batches = len(inputs) // 128
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, epochs * batches)
    ensemble.train()
    for _ in range(epochs):
        for index in torch.randperm(len(inputs), device="cpu")[: 128 * batches].split(128):
            loss = functional.cross_entropy(ensemble(inputs[index]), labels[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            rates.step()
    return ensemble.eval()


def measured(ensemble: rse.SelfEnsemble, images: int, eps: float, seed: int) -> dict[str, float]:
    """Accuracies in percent."""
    data = rse.load_data("digits", "test")
    inputs, labels = data.inputs(), data.labels

    def right(found: Tensor) -> float:
        answers = ensemble.predict(found, sampling="per_image", seed=seed).label
        return 100 * float((answers == labels[: len(found)]).float().mean())

    attacked = pgd(
        ensemble, inputs[:images], labels[:images], norm="l2", eps=eps, steps=20, eot=8,
        average="probabilities", seed=seed,
    )  # fmt: skip
    return {"clean": right(inputs), "attacked": right(attacked)}


def row(entry: dict[str, Any]) -> str:
    clean, attacked = ([each[key] for each in entry["runs"]] for key in ("clean", "attacked"))
    cells = [
        f"{sum(each) / len(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in (clean, attacked)
    ]
    return f"| {entry['place']} | {entry['level']:g} | {' | '.join(cells)} |"


def mean(entry: dict[str, Any], key: str) -> float:
    return float(sum(each[key] for each in entry["runs"]) / len(entry["runs"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--eps", type=float, default=0.5)
    parser.add_argument("--cost", type=float, default=1.5, help="points of accuracy that noise may cost")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work: list[tuple[str, str | None, float]] = [("no noise", None, 0.0)]
    work += [(place, place, level) for place in PLACES for level in LEVELS[place.startswith("patches")]]
    head = f"| noise | level | accuracy | under PGD, L2 {options.eps:g} |\n|---|---|---|---|"
    print(head, flush=True)
    entries: list[dict[str, Any]] = []
    for title, place, level in work:
        runs = [
            measured(trained(place, level, seed, options.epochs), options.images, options.eps, seed)
            for seed in range(options.seeds)
        ]
        entries.append({"place": title, "level": level, "runs": runs})
        print(row(entries[-1]), flush=True)
    least = mean(entries[0], "clean") - options.cost
    print(f"\nAt {least:.1f} % without attack or more:\n\n{head}")
    for title in ("no noise", *PLACES):
        good = [entry for entry in entries if entry["place"] == title and mean(entry, "clean") >= least]
        if good:
            print(row(max(good, key=lambda entry: mean(entry, "attacked"))))
    if options.out is not None:
        options.out.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
