"""Is an export the model of its checkpoint? Every tensor, streamed from both sides: no model, no GPU, little memory."""

from collections.abc import Sequence
from pathlib import Path

from megatron_lpr.conversion.export.trained_model import trained_model
from megatron_lpr.conversion.record import Made
from megatron_lpr.conversion.verify.report import Check
from megatron_lpr.conversion.verify.tensors import compare_tensors
from megatron_lpr.errors import UserError
from megatron_lpr.families import family_of, read_architecture
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.files.safetensors_io import SafetensorsReader


def compare_with_checkpoint(
    checkpoint: Path,
    made: Made,
    export_dir: str | Path,
    base_dir: str | Path,
    *,
    graft_delta: Sequence[str | Path] | None = None,
) -> Check:
    """Every tensor of an export against the checkpoint's, with the delta added again where it was grafted.

    UserError when the checkpoint, the base and the models of the delta do not fit; what is wrong with the export itself
    fails the check.
    """
    config = read_config(export_dir)
    field = family_of(read_architecture(base_dir)).moe.fields.get("shared_expert_size", ("",))[0]
    width = config.get(field) if made.num_experts else None
    model = trained_model(
        checkpoint,
        made,
        base_dir=base_dir,
        dtype=config.get("dtype", "float32"),
        shared_expert_size=width if type(width) is int and width >= 0 else None,
        graft_delta=graft_delta,
    )
    try:
        return compare_tensors(SafetensorsReader(export_dir), model.source)
    except UserError as error:
        return Check(name="checkpoint", ok=False, detail=str(error))
