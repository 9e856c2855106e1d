"""Hugging Face tensors into a Megatron model."""
