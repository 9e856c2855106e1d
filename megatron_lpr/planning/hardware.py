"""GPUs that a run may be planned for, and how they are joined: numbers of NVIDIA's data sheets.

A data sheet counts both directions of NVLink and prints Tensor Core peaks "with sparsity"; here are one direction and
dense peaks. Between nodes each GPU has a network card of its own, as in NVIDIA's DGX systems and in most clouds.

    a100   A100 80GB SXM (data sheet 2021): 80 GB, NVLink 600 GB/s; DGX A100: 8 x ConnectX-6, 200 Gb/s
    h100   H100 SXM (data sheet 2023): 80 GB, NVLink 900 GB/s; DGX H100: 8 x ConnectX-7, 400 Gb/s
    h200   H200 SXM (data sheet 2024): 141 GB, NVLink 900 GB/s; DGX H200: 8 x ConnectX-7, 400 Gb/s
    b200   HGX B200 (data sheet 2024): 180 GB, NVLink 1.8 TB/s; DGX B200: 8 x ConnectX-7, 400 Gb/s

Peaks, TFLOP/s in bf16 and in fp32 (without TF32, as torch computes): A100 312 and 19.5, H100 and H200 989.5 and 67,
B200 2250 and 75; in fp8 (`fp8.recipe`) H100 and H200 1979, B200 4500, and the A100 has none.
"""

from dataclasses import dataclass, replace

from megatron_lpr.errors import UserError, nearest

# For CUDA's context, buffers of NCCL and cuBLAS, and gaps of the allocator, none of which is reckoned
KEPT_FREE = 0.1


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU and its links; bytes per second are those of one direction.

    flops: per second at the peak, by dtype; "fp8" where it computes in that.
    inside, between: from a GPU to others of its node, and to other nodes.
    """

    name: str
    memory: int
    flops: dict[str, float]
    inside: float
    between: float
    per_node: int = 8

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - KEPT_FREE))


def _gpu(name: str, gigabytes: int, bf16: float, fp32: float, nvlink: float, network: float, fp8: float = 0) -> GPU:
    peaks = {"bfloat16": bf16, "float32": fp32, "fp8": fp8}
    return GPU(
        name=name,
        memory=gigabytes * 10**9,
        flops={dtype: peak * 1e12 for dtype, peak in peaks.items() if peak},
        inside=nvlink * 1e9,
        between=network * 1e9,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 312, 19.5, 300, 25),
        _gpu("h100", 80, 989.5, 67, 450, 50, fp8=1979),
        _gpu("h200", 141, 989.5, 67, 450, 50, fp8=1979),
        _gpu("b200", 180, 2250, 75, 900, 50, fp8=4500),
    )
}


def gpu_named(name: str, gigabytes: float | None = None) -> GPU:
    """One of the table, or the same with another memory.

    Raises:
        UserError: the table lacks it.
    """
    if name not in GPUS:
        instead = "name one like it, and give its GB with --memory"
        raise UserError(f"--gpu {name}: not in the table; {instead}{nearest(name, GPUS)}")
    if gigabytes is None:
        return GPUS[name]
    if not 0 < gigabytes < 10_000:
        raise UserError(f"--memory {gigabytes:g}: no GB of a GPU")
    return replace(GPUS[name], memory=round(gigabytes * 10**9))
