"""Does training suffer when half a batch has the opposite noise of the other half? Digits, many seeds.

python benchmarks/opposite_noise.py [--seeds 6] [--steps 150]
"""

import statistics

import torch
from timing import arguments, parsed, report
from torch import nn

import selfensemble as rse


def trained(seed: int, steps: int, opposite: bool) -> tuple[float, float]:
    """Accuracy and negative log-likelihood on the test set."""
    torch.manual_seed(seed)
    data, test = rse.load_data("digits", "train"), rse.load_data("digits", "test")
    ensemble = rse.SelfEnsemble(rse.create_model("small-cnn", channels=1), rse.NoiseConfig(0.47, 0.1)).train()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-2)
    for _ in range(steps):
        chosen = torch.randint(len(data), (128,), device="cpu")
        optimizer.zero_grad()
        with rse.noise_draw(opposite=opposite):
            nn.functional.cross_entropy(ensemble(data.inputs(chosen)), data.labels[chosen]).backward()
        optimizer.step()
    mean = ensemble.eval().predict_proba(test.inputs(slice(None)), draws=50, seed=1)
    right = (mean.argmax(dim=1) == test.labels).float().mean()
    return float(right), float(nn.functional.nll_loss(mean.log(), test.labels))


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150)
    options = parsed(parser)
    rows, values = [], {}
    for name, opposite in (("opposite", True), ("each its own", False)):
        found = [trained(seed, options.steps, opposite) for seed in range(options.seeds)]
        row = [name]
        for each in zip(*found, strict=True):
            error = statistics.stdev(each) / len(each) ** 0.5
            row.append(f"{statistics.mean(each):.4f} ({error:.4f})")
        rows.append(row)
        values[name] = found
    title = f"Digits, small CNN, {options.steps} steps, {options.seeds} seeds: mean (standard error)"
    report("opposite_noise", title, ["noise", "accuracy", "log loss"], rows, values, options.out)


if __name__ == "__main__":
    main()
