"""An export against all that is known of it: its base and its record, its checkpoint's tensors, and their logits."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.checkpoint.own_recipe import own_recipe
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.conversion.record import Made, made_of
from megatron_lpr.conversion.verify.report import Check, VerifyReport
from megatron_lpr.conversion.verify.tensors import compare_with_checkpoint
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.platform import megatron, single_process
from megatron_lpr.recipe.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What an export is compared with; nothing of it has been read but configs.

    checkpoint: every tensor is compared with it; None: only what is frozen, with the base.
    load: where the checkpoint that its run started from may be now.
    checksums: its files are compared with theirs first, and not only with their sizes.
    typed: the recipe that somebody gave; it counts where neither checkpoint nor record say what was done.
    text: the recipe whose held-out text the logits are compared on; None: they are not.
    graft_delta: (BASE, INSTRUCT) of a grafted export.
    num_frozen: counts where there is no recipe either.
    """

    export_dir: Path
    base_dir: str
    checkpoint: Path | None = None
    load: str | None = None
    checksums: bool = True
    typed: Recipe | None = None
    text: Recipe | None = None
    graft_delta: Sequence[str | Path] | None = None
    num_frozen: int | None = None

    def run(self, on_check: Callable[[Check], object] = lambda check: None, *, progress: bool = False) -> VerifyReport:
        """All checks; `on_check` gets each as soon as it is known.

        Raises:
            UserError: a folder cannot be read at all, or they do not belong together.
        """
        if self.checkpoint:
            refuse_damaged(self.checkpoint, contents=self.checksums, load=self.load)
        made = made_of(self.checkpoint) if self.checkpoint else None
        grafted_on, hf_dir = self.graft_delta or (None, self.base_dir)
        report = verify_export(
            self.export_dir,
            hf_dir,
            checkpoint=made,
            recipe=Made.of_recipe(self.typed) if self.typed else None,
            num_frozen=self.num_frozen,
            grafted_on=grafted_on,
            progress=progress,
        )
        checks = list(report.checks)
        for check in checks:
            on_check(check)
        if self.checkpoint and made:
            checks.append(
                compare_with_checkpoint(
                    self.checkpoint,
                    made,
                    self.export_dir,
                    self.base_dir,
                    load=self.load,
                    graft_delta=self.graft_delta,
                )
            )
            on_check(checks[-1])
        if self.checkpoint and self.text:
            with megatron():
                from megatron_lpr.conversion.verify.against_logits import compare_logits

                checks.append(compare_logits(self.text, str(self.checkpoint), str(self.export_dir)))
            on_check(checks[-1])
        return dataclasses.replace(report, checks=tuple(checks))


def plan_verification(
    export_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    own: Recipe | None = None,
    logits: bool = True,
    graft_delta: Sequence[str | Path] | None = None,
    num_frozen: int | None = None,
) -> Verification:
    """The base model is `base`, or else that of `recipe`, or of the checkpoint's own.

    recipe: in place of the checkpoint's own. own: the checkpoint's own, where settings of it were changed.
    logits: compare them too, where there is a checkpoint and nothing was grafted (no Megatron model has that delta).

    Raises:
        UserError: there is no base, nothing to compare logits on, or a folder without a config that can be read.
    """
    folder = checkpoint_folder(str(checkpoint)) if checkpoint else None
    used = recipe or own or (own_recipe(folder) if folder else None)
    base = base or (used.model.base if used else None) or (graft_delta[0] if graft_delta else None)
    if base is None:
        if not Path(export_dir).is_dir():
            raise UserError(f"verify {export_dir}: no such folder; name one that megatron-lpr export wrote, or a run's")
        raise UserError(
            f"verify {export_dir}: against what? Give the checkpoint (--checkpoint), which knows its base, or the base "
            "(--base)"
        )
    text = None
    if folder and used and logits and not graft_delta:
        single_process("verify --checkpoint")
        if not used.evaluation.corpora:
            raise UserError(
                "evaluation.corpora: empty; comparing logits needs some held-out text (--recipe), or --no-logits"
            )
        text = dataclasses.replace(used, model=dataclasses.replace(used.model, base=str(base)))
    read_config(export_dir), read_architecture(base)
    return Verification(
        export_dir=Path(export_dir),
        base_dir=str(base),
        checkpoint=folder,
        load=used.model.load if used else None,
        checksums=used is None or used.checkpoint.verify,
        typed=recipe,
        text=text,
        graft_delta=graft_delta,
        num_frozen=num_frozen,
    )
