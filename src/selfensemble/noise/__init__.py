"""The noise: its layer, where its numbers come from, how it enters a network, and other random layers."""
