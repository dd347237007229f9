"""Attacks: `attack(model, inputs, labels, *, targeted=False, ...) -> adversarial`.

`inputs` are (B, C, H, W) in [0, 1]; `labels` are (B,) int64, the true classes, or the wanted ones where
`targeted`. Adversarial images have the shape of `inputs` and stay in [0, 1]. An attack attacks the
model in eval mode and computes gradients with respect to its inputs only. It claims nothing: whether an
image is adversarial is for `evaluation.judge` to say, on fresh noise.
"""

