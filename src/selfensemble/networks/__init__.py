"""The included networks."""
