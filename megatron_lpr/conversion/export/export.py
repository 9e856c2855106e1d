"""Export: a stream of whole tensors becomes a stock Hugging Face checkpoint, or no folder at all.

Three sources share one writer: a Megatron distributed checkpoint (`export_checkpoint`), a HF checkpoint upcycled
offline (`upcycle_hf`), and parameters in memory (`export_model`). None of them needs a Megatron model or a GPU.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.checkpoint.provenance import read_provenance
from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state
from megatron_lpr.conversion.export.model_card import ModelCard
from megatron_lpr.conversion.export.parallel_write import filling
from megatron_lpr.conversion.export.sources import UpcycledSource
from megatron_lpr.conversion.export.to_hf import NamedTensors, to_hf
from megatron_lpr.conversion.export.trained_model import trained_model
from megatron_lpr.conversion.record import ExportRecord, Made, digests, made_of
from megatron_lpr.conversion.verify.verify import VerifyReport, verify_export
from megatron_lpr.errors import UserError, warn
from megatron_lpr.families import Architecture, family_of, read_architecture
from megatron_lpr.families.export_config import check_carried_over, export_config
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.families.hub_id import check_hub_id, hub_id
from megatron_lpr.families.origins import check_upcycling, with_layers_kept_dense, with_shared_expert, zero_tensors
from megatron_lpr.families.remarks import remarks
from megatron_lpr.families.sizes import model_bytes, parse_size
from megatron_lpr.files.new_folder import complete_folder, copy_companions
from megatron_lpr.files.output_place import check_place, check_vacant
from megatron_lpr.files.safetensors_io import ShardedWriter, torch_dtype
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import ExportConfig, Recipe

MAX_SHARD_BYTES = 4 * 10**9

OnVerified = Callable[[VerifyReport], object]


@dataclass(frozen=True, kw_only=True)
class _Export:
    """What is written beside the tensors, and what the folder must be.

    hf_dir: the HF model whose config, tokenizer and frozen tensors the export has: the base, or the instruct model.
    reads: the other folders that are read.
    made: what was made of the base. step: of the checkpoint.
    grafted_on: the base of a grafted delta; `hf_dir` is its instruct model then.
    on_verified: the folder is verified before it appears, and this is given the report.
    """

    arch: Architecture
    hf_dir: Path
    out_dir: Path
    made: Made
    max_shard_bytes: int
    card: ModelCard
    on_verified: OnVerified | None
    reads: tuple[str | Path, ...] = ()
    step: int | None = None
    grafted_on: Path | None = None
    progress: bool = False

    def run(self, fill: Callable[[ShardedWriter], None], *, dry_run: bool = False) -> Path:
        """Checks what can be known before the work, warns, and writes, unless it is a dry run. UserError."""
        experts, dtype = self.made.num_experts, self.card.dtype
        check_carried_over(read_config(self.hf_dir), self.arch, self.hf_dir)
        check_place(self.out_dir, self.hf_dir, *self.reads, needed=model_bytes(self.arch, experts, dtype))
        check_vacant(self.out_dir)
        for sentence in remarks(self.arch, self.hf_dir, dtype=dtype, num_experts=experts):
            warn(sentence)
        if not dry_run:
            self._write(fill)
        return self.out_dir

    def _write(self, fill: Callable[[ShardedWriter], None]) -> None:
        experts, topk = self.made.num_experts, self.made.topk
        shapes = family_of(self.arch).shapes(self.arch, experts)
        config = export_config(
            self.arch, read_config(self.hf_dir), num_experts=experts, topk=topk, dtype=self.card.dtype
        )
        record = ExportRecord(
            made=self.made,
            dtype=self.card.dtype,
            step=self.step,
            base=digests(self.grafted_on or self.hf_dir),
            instruct=digests(self.hf_dir) if self.grafted_on else None,
        )
        with complete_folder(self.out_dir) as folder:
            writer = ShardedWriter(
                folder, shapes, dtype=torch_dtype(self.card.dtype), max_shard_bytes=self.max_shard_bytes
            )
            fill(writer)
            writer.close()
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            copy_companions(self.hf_dir, folder)
            record.write(folder)
            report = self._verify(folder) if self.on_verified else None
            if report and report.frozen_sha256:
                dataclasses.replace(record, frozen_sha256=report.frozen_sha256).write(folder)
            card = dataclasses.replace(self.card, frozen_sha256=report and report.frozen_sha256)
            (folder / "README.md").write_text(card.markdown(), encoding="utf-8")

    def _verify(self, folder: Path) -> VerifyReport:
        report = verify_export(
            folder, self.hf_dir, checkpoint=self.made, grafted_on=self.grafted_on, progress=self.progress
        )
        self.on_verified(report)
        if not report.ok:
            wrong = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.ok)
            raise UserError(f"'{self.out_dir}' was not written, for it fails its own verification: {wrong}")
        return report


def export_model(
    tensors: NamedTensors,
    arch: Architecture,
    *,
    base_dir: str | Path,
    out_dir: str | Path,
    num_experts: int = 0,
    num_frozen: int = 0,
    topk: int = 2,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes parameters in memory as the family's stock MoE class (`num_experts` > 0) or as its dense class again.

    tensors: (global Megatron name, whole tensor), each once, in any order. Layers are numbered globally;
        `...mlp.experts.local_experts.I...` counts I over all new experts, so it becomes expert `num_frozen +
        I`. The head of a model with tied embeddings is left out.
    base_dir: the dense model that training started from; its tokenizer and generation files are copied byte
    for byte. dtype: of the export, default that of the base model. num_frozen: experts 0..num_frozen-1 are
    the frozen ones. Returns `out_dir`. UserError when it exists and is not empty, when the disk is full or
    when a tensor never came; then nothing is left behind.
    """
    check_upcycling(arch, num_experts=num_experts, num_frozen=num_frozen, topk=topk)

    def fill(writer: ShardedWriter) -> None:
        for name, tensor in to_hf(tensors, arch, num_frozen=num_frozen):
            writer.write(name, tensor)
        for name, tensor in zero_tensors(arch, num_experts):
            writer.write(name, tensor)

    return _Export(
        arch=arch,
        hf_dir=Path(base_dir),
        out_dir=Path(out_dir),
        made=_upcycled(arch, num_experts, num_frozen, topk),
        max_shard_bytes=max_shard_bytes,
        card=ModelCard(
            **_names(base_dir, "base"),
            base_experts=arch.num_experts,
            num_experts=num_experts,
            num_frozen=num_frozen,
            topk=topk,
            dtype=dtype or arch.dtype,
        ),
        on_verified=None,
    ).run(fill)


def upcycle_hf(
    base_dir: str | Path,
    out_dir: str | Path,
    *,
    num_experts: int,
    num_frozen: int = 1,
    topk: int = 2,
    router_std: float = 0.02,
    seed: int = 0,
    dtype: str | None = None,
    mlp_only_layers: Sequence[int] = (),
    shared_expert_size: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    processes: int = 1,
    on_verified: OnVerified | None = None,
    command: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Path:
    """Upcycles a HF checkpoint into the family's stock MoE class, tensor by tensor, without Megatron.

    The result computes what a dense model computes (for one that has experts already see origins.py) and equals
    what `load_dense` followed by `export_model` writes. mlp_only_layers, shared_expert_size: see
    `with_layers_kept_dense` and `with_shared_expert`. on_verified: verify the folder before it appears, and hand over
    the report. dry_run: check everything that can be checked first, write nothing. UserError as `export_model`.
    """
    arch = with_shared_expert(with_layers_kept_dense(read_architecture(base_dir), mlp_only_layers), shared_expert_size)
    check_upcycling(arch, num_experts=num_experts, num_frozen=num_frozen, topk=topk)
    source = UpcycledSource(base_dir, arch, num_experts=num_experts, router_std=router_std, seed=seed)
    planned = _Export(
        arch=arch,
        hf_dir=Path(base_dir),
        out_dir=Path(out_dir),
        made=_upcycled(arch, num_experts, num_frozen, topk),
        max_shard_bytes=max_shard_bytes,
        card=ModelCard(
            **_names(base_dir, "base"),
            base_experts=arch.num_experts,
            num_experts=num_experts,
            num_frozen=num_frozen,
            topk=topk,
            dtype=dtype or arch.dtype,
            router_seed=seed,
            router_std=router_std,
            command=command,
        ),
        on_verified=on_verified,
        progress=progress,
    )
    return planned.run(filling(source, "upcycle", processes=processes, progress=progress), dry_run=dry_run)


def export_checkpoint(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    base_dir: str | Path,
    settings: ExportConfig | None = None,
    graft_delta: Sequence[str | Path] | None = None,
    on_verified: OnVerified | None = None,
    command: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Path:
    """Writes a distributed checkpoint, or the newest of a run, as a stock HF model; needs no Megatron and no GPU.

    base_dir: the HF model that training started from. graft_delta: (BASE, INSTRUCT), see graft.py; the export then
    has INSTRUCT's config, tokenizer and frozen tensors. on_verified: verify the folder before it appears, and hand
    over the report. dry_run: check everything that can be checked first, write nothing. UserError as `export_model`,
    and when checkpoint and base do not belong together.
    """
    settings = settings or ExportConfig()
    folder = checkpoint_folder(str(checkpoint))
    state, made = read_run_state(folder), made_of(folder)
    saved = from_tree(Recipe, state.recipe, where=f"checkpoint {folder}")
    dtype = saved.model.dtype if settings.dtype == "auto" else settings.dtype
    model = trained_model(
        folder,
        made,
        base_dir=base_dir,
        dtype=dtype,
        shared_expert_size=settings.shared_expert_size,
        graft_delta=graft_delta,
    )
    provenance = read_provenance(folder)
    planned = _Export(
        arch=model.arch,
        hf_dir=model.hf_dir,
        out_dir=Path(out_dir),
        made=made,
        max_shard_bytes=parse_size(settings.max_shard_size),
        card=ModelCard(
            **_names(base_dir, "base", settings.base_model),
            **(_names(model.hf_dir, "instruct") if graft_delta else {}),
            base_experts=model.arch.num_experts,
            num_experts=made.num_experts,
            num_frozen=made.untouched,
            topk=made.topk,
            dtype=dtype,
            provenance=provenance,
            router_seed=provenance.router_seed,
            router_std=provenance.router_std,
            results=_results(settings.results),
            command=command,
        ),
        on_verified=on_verified,
        progress=progress,
        reads=(folder, *(graft_delta or ())),
        step=state.step,
        grafted_on=Path(graft_delta[0]) if graft_delta else None,
    )
    fill = filling(model.source, "export", processes=settings.processes, progress=progress)
    return planned.run(fill, dry_run=dry_run)


def _names(hf_dir: str | Path, role: str, given: str | None = None) -> dict[str, str | None]:
    """What the card calls a model: its id on the hub, where that is known, and a name for people."""
    name = check_hub_id(given, "export.base_model") if given else hub_id(hf_dir)
    return {role: name or Path(hf_dir).resolve().name, f"{role}_id": name}


def _upcycled(arch: Architecture, num_experts: int, num_frozen: int, topk: int) -> Made:
    return Made(
        num_experts=num_experts,
        num_frozen_experts=num_frozen if num_experts else 0,
        topk=topk if num_experts else 0,
        mlp_only_layers=arch.mlp_only_layers if num_experts else (),
    )


def _results(files: Sequence[str]) -> str | None:
    """The table of evaluation results for the card. UserError as `retention_table`."""
    if not files:
        return None
    from megatron_lpr.evaluation.retention import EvaluationResult, retention_table

    return retention_table([EvaluationResult.load(file) for file in files])
