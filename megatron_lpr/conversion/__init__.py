"""Conversion between Hugging Face checkpoints and our Megatron models."""
