"""Certified accuracy that others published, to draw beside ours."""

# Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing, ICML 2019, tables of
# CIFAR-10: ResNet-110, by votes, n = 100,000; by std of the noise, per cent at an L2 radius.
COHEN = {
    0.12: {0.0: 81, 0.25: 59, 0.5: 0, 0.75: 0, 1.0: 0},
    0.25: {0.0: 75, 0.25: 60, 0.5: 43, 0.75: 27, 1.0: 0},
    0.5: {0.0: 65, 0.25: 55, 0.5: 41, 0.75: 32, 1.0: 23},
}


def is_theirs(source: str) -> bool:
    """Whether images of this source are those of the published figures."""
    return "cifar10" in source.lower().replace("-", "").replace("cifar100", "")
