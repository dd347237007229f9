"""Certified accuracy that others published, to draw beside ours."""

# Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing, ICML 2019, tables of
# CIFAR-10: ResNet-110, by votes, n = 100,000; by std of the noise, per cent at an L2 radius.
COHEN: dict[float, dict[float, float]] = {
    0.12: {0.0: 81, 0.25: 59, 0.5: 0, 0.75: 0, 1.0: 0},
    0.25: {0.0: 75, 0.25: 60, 0.5: 43, 0.75: 27, 1.0: 0},
    0.5: {0.0: 65, 0.25: 55, 0.5: 41, 0.75: 32, 1.0: 23},
}

# Trainings that came after it, with noise of std .25: ResNet-110, by votes, n = 100,000. Counted over all
# test images from the published tables of single images: alinlab/smoothing-catrs,
# jh-jeong/smoothing-consistency, and eth-sri/acr-weakness.
CERTIFIED: dict[str, dict[float, float]] = {
    "Gaussian, longer training": {0.0: 80.4, 0.25: 66.8, 0.5: 50.5, 0.75: 32.7},
    "SmoothAdv": {0.0: 74.0, 0.25: 66.2, 0.5: 56.7, 0.75: 47.5},
    "consistency, weight 10": {0.0: 77.8, 0.25: 68.8, 0.5: 57.4, 0.75: 43.8},
    "consistency, weight 20": {0.0: 75.8, 0.25: 67.6, 0.5: 58.1, 0.75: 46.7},
    "SmoothMix": {0.0: 77.1, 0.25: 67.9, 0.5: 57.9, 0.75: 46.7},
    "CAT-RS": {0.0: 76.3, 0.25: 68.1, 0.5: 58.8, 0.75: 48.2},
    "Sun et al.": {0.0: 76.6, 0.25: 69.0, 0.5: 59.3, 0.75: 48.3},
}


def is_theirs(source: str) -> bool:
    """Whether images of this source are those of the published figures."""
    return "cifar10" in source.lower().replace("-", "").replace("cifar100", "")
