"""Give a language model new languages without making it forget its own (MoE-LPR on Megatron-Core)."""

__version__ = "0.1.0"
