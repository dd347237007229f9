"""Training: recipes, the trainer and its parts, defenses, callbacks of other frameworks."""
