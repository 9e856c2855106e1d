"""What makes Megatron-Core ready: on a machine without CUDA, and with a package that breaks it."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lpr.errors import UserError
from megatron_lpr.platform.device import _give_triton_a_folder, _prepare_process

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


def test_no_temporary_folder_is_told(monkeypatch):
    """Megatron's import would fail with a traceback."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    with pytest.raises(UserError, match="no folder for temporary files can be written to"):
        _prepare_process.__wrapped__()


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


def test_what_torch_knows_of_a_stored_tensor_is_more_than_megatron_takes(megatron):
    """Its strides, from 2.15 on; no checkpoint could be loaded."""
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    properties = TensorProperties(dtype=torch.bfloat16)
    properties.strides = (3, 1)
    metadata = Metadata({"weight": TensorStorageMetadata(properties, torch.Size([2, 3]), [])})
    found = TorchDistLoadShardedStrategy().load_tensors_metadata(None, metadata)["weight"]
    assert found.global_shape == (2, 3) and found.dtype == torch.bfloat16


class NewElements(TorchDispatchMode):
    """The most elements of a tensor that an operation found memory for."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="where Megatron may have kernels of Transformer Engine or Apex")
def test_gradients_are_clipped_in_place_with_megatrons_bits(megatron):
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.utils import local_multi_tensor_scale

    from megatron_lpr.platform.shims import cuda_type_names

    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = parameter.grad.clone()
    local_multi_tensor_scale(0, None, [[expected], [expected]], 0.3 / (7.0 + 1e-6))
    with cuda_type_names(), NewElements() as new:
        clip_grad_by_total_norm_fp32([parameter], 0.3, 7.0)
    assert torch.equal(parameter.grad, expected) and new.most <= 1


@pytest.mark.parametrize(("asked", "threads"), [({}, 3), ({"OMP_NUM_THREADS": "5"}, 5)])
def test_torch_takes_no_more_threads_than_a_containers_quota_has_cores(asked, threads):
    prepare = (
        "import sys, torch; torch.set_num_threads(5)\n"
        "from megatron_lpr.platform import prepare\n"
        "sys.modules['megatron_lpr.platform.device'].usable_cores = lambda: 3\n"
        "prepare(); print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | asked
    command = [sys.executable, "-c", prepare]
    assert int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout) == threads


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({"HOME": "/nowhere"}, True), ({"HOME": "."}, False), ({"HOME": "/nowhere", "TRITON_HOME": "."}, False)],
)
def test_triton_keeps_kernels_where_it_may_write(environment, folder, monkeypatch, tmp_path):
    """A container's user may have no home: the first step ended in a PermissionError."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _give_triton_a_folder()
    chosen = os.environ.pop("TRITON_CACHE_DIR", None)
    assert chosen == (str(tmp_path / f"triton-{os.getuid()}") if folder else None)
