#!/usr/bin/env python
"""Seconds, GB/s and peak memory of conversions, against a plain safetensors copy of the same bytes in the same run.

    python benchmarks/conversion.py                 # a MoE of 1.4 billion parameters, bf16; needs 12 GB of disk
    python benchmarks/conversion.py --params 0.2    # smaller

A dense model of random bf16 weights is generated, Megatron writes it upcycled as a distributed checkpoint, and each job
runs in a process of its own, several times, in turns. Seconds count from after the imports until the bytes are on the
disk (fsync, of the copy too). Memory is the peak resident set of the process, Python and PyTorch included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, FFN, VOCABULARY, HEADS, GROUPS, HEAD_DIM, EXPERTS = 1536, 4096, 49152, 12, 4, 128, 4
EMBEDDING = HIDDEN * VOCABULARY
LAYER = EXPERTS * 3 * HIDDEN * FFN + 2 * HIDDEN * HEAD_DIM * (HEADS + GROUPS)
TOOLS = Path(__file__).resolve().parents[1] / "tools" / "convert_hf.py"


def copy(root: Path, out: Path) -> None:
    """Every tensor of each file is loaded by safetensors and saved again."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for file in sorted((root / "moe").glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            save_file({name: opened.get_tensor(name) for name in opened.keys()}, out / file.name)
        with open(out / file.name, "rb") as written:
            os.fsync(written.fileno())


def export(root: Path, out: Path, verify: bool = False) -> None:
    """Distributed checkpoint -> HF MoE."""
    from megatron_lpr.conversion.export.export import export_checkpoint

    export_checkpoint(root / "checkpoint", out, base_dir=root / "base", on_verified=str if verify else None)


def upcycle(root: Path, out: Path) -> None:
    """HF dense -> HF MoE, without Megatron."""
    from megatron_lpr.conversion.export.export import upcycle_hf
    from megatron_lpr.families.expansion import Expansion

    upcycle_hf(root / "base", out, Expansion(num_experts=EXPERTS))


JOBS = {
    "safetensors copy": copy,
    "checkpoint -> HF": export,
    "checkpoint -> HF, verified": lambda root, out: export(root, out, verify=True),
    "HF dense -> HF MoE": upcycle,
}


def run_job(name: str, root: Path) -> None:
    """In a process of its own: prints seconds and peak memory (of its own children too) as JSON."""
    import resource

    import megatron_lpr.conversion.export  # noqa: F401  (what every job needs, before the clock starts)

    if name.endswith("verified"):
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401  (the stock class)

    out = root / "out"
    start = time.perf_counter()
    JOBS[name](root, out)
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "peak": peak * 1024}))


def prepare(root: Path, layers: int) -> None:
    """base/: dense, random, bf16. checkpoint/: upcycled, written by Megatron. moe/: its export, which `copy` copies."""
    call = [sys.executable, str(TOOLS)]
    subprocess.run([sys.executable, __file__, "--root", str(root), "--generate", str(layers)], check=True)
    convert = ["hf-to-megatron", str(root / "base"), str(root / "checkpoint"), "--num-experts", str(EXPERTS)]
    start = time.perf_counter()
    subprocess.run([*call, *convert], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"hf-to-megatron, imports included: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    to_hf = ["megatron-to-hf", str(root / "checkpoint"), str(root / "moe"), "--no-verify"]
    subprocess.run([*call, *to_hf], check=True, stdout=subprocess.DEVNULL)


def generate(root: Path, layers: int) -> None:
    import torch

    from megatron_lpr.testing.toy_models import write_toy_model

    torch.set_default_dtype(torch.float32)
    write_toy_model(
        root / "base", dtype="bfloat16", hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD_DIM, vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )  # fmt: skip


def measure(root: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    for _ in range(repeats):
        for name in JOBS:
            shutil.rmtree(root / "out", ignore_errors=True)
            os.sync()
            command = [sys.executable, __file__, "--root", str(root), "--job", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def table(results: dict[str, list[dict[str, float]]], size: int) -> str:
    largest = max(EMBEDDING, HIDDEN * FFN) * 2
    peer = statistics.median(run["seconds"] for run in results["safetensors copy"])
    lines = ["| job | seconds (median) | GB/s | of the copy's time | peak memory | above the largest tensor |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, runs in results.items():
        seconds, peak = statistics.median(run["seconds"] for run in runs), max(run["peak"] for run in runs)
        lines.append(
            f"| {name} | {seconds:.2f} | {size / seconds / 1e9:.2f} | {seconds / peer:.2f}x | {peak / 1e9:.2f} GB | "
            f"{(peak - largest) / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=1.4, help="parameters of the MoE model, in billions")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each job")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder without it")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--generate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return run_job(options.job, options.root)
    if options.generate:
        return generate(options.root, options.generate)
    layers = max(1, round((options.params * 1e9 - EMBEDDING) / LAYER))
    size = 2 * (EMBEDDING + layers * (LAYER + EXPERTS * HIDDEN + 2 * HIDDEN) + HIDDEN)
    folder = options.folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if free < 4.5 * size:
        sys.exit(f"'{folder}' has {free / 1e9:.1f} GB free, {4.5 * size / 1e9:.1f} GB are needed; see --help")
    with tempfile.TemporaryDirectory(dir=folder, prefix="conversion-") as root:
        prepare(Path(root), layers)
        results = measure(Path(root), options.repeats)
    model = f"MoE of {size / 2e9:.2f} billion parameters, {layers} layers, {EXPERTS} experts"
    print(f"{model}: {size / 1e9:.2f} GB in bf16\n")
    print(table(results, size))


if __name__ == "__main__":
    main()
