"""What a test of a GPU asks for: marks, each with the reason for which it is skipped elsewhere."""

import importlib.util
import os

import pytest
import te_on_cpu
import torch

NEEDS_TE = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EMULATED = bool(os.environ.get(te_on_cpu.VARIABLE))
ON_GPU_OR_EMULATION = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not EMULATED,
        reason="needs a CUDA device, or Transformer Engine emulated (make test-te)",
    ),
    NEEDS_TE,
]
