"""Megatron parameters into a Hugging Face folder."""
