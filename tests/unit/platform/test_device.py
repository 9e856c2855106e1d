"""What makes Megatron-Core ready: on a machine without CUDA, and with a package that breaks it."""

import subprocess
import sys

import pytest
import torch

# Apex is looked at only where there is a GPU for its kernels
PREPARE = (
    "import sys; sys.path.insert(0, {!r})\n"
    "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
    "sys.modules['transformer_engine'] = None\n"
    "from megatron_lpr.platform import prepare; prepare()"
)


def test_foreign_apex_is_refused(tmp_path):
    """PyPI's `apex` is a web toolkit."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    result = subprocess.run([sys.executable, "-c", PREPARE.format(str(tmp_path))], capture_output=True, text=True)
    assert f"UserError: the package `apex` in {tmp_path}/apex is not NVIDIA's Apex" in result.stderr


def test_apex_without_its_kernels_is_refused(tmp_path):
    """Its optimizer imports, and raises at the first step."""
    (tmp_path / "apex/multi_tensor_apply").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    result = subprocess.run([sys.executable, "-c", PREPARE.format(str(tmp_path))], capture_output=True, text=True)
    assert "Apex in" in result.stderr and "without its CUDA extensions" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")
def test_cuda_means_the_cpu(megatron):
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, pin_memory=True).cuda().device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().synchronize()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")
def test_type_names_are_cudas_only_where_megatron_asks(megatron):
    from megatron_lpr.platform.shims import cuda_type_names

    assert torch.zeros(1).type() == "torch.FloatTensor"
    with cuda_type_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.double).dtype == torch.double
