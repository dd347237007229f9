"""The doctor: signs that a model, or an evaluation of it, is not what it seems."""
