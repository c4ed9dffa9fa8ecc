"""Bench: what kernels, decoding and search trials cost on this machine, each against 16 bits."""
