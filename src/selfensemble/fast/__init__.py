"""The fast path: batch norm folded, convolutions laid out ahead, small maps, replayed steps."""
