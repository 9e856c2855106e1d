"""Checkpoints and the runs they belong to: written, found, read with and without a model."""
