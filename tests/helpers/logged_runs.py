"""Output folders of runs, as training leaves them, without a model: what `report` and `plot` read."""

import json
import math
from pathlib import Path

import yaml

LAYERS, EXPERTS = 4, 3


def log_run(folder: Path, name: str, steps: int = 30, languages=("hu", "en"), *, every: int = 10, **settings) -> Path:
    """A run that has ended; layers' statistics and a validation every so many steps. settings: of the optimizer."""
    folder.mkdir(parents=True)
    records = [record(step, steps, name, languages, every) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(its) + "\n" for its in records), encoding="utf-8")
    start = {"time": "2026-11-25T12:00:00.000Z", "step": 0, "hosts": ["n1"], "world_size": 8, "device": "cpu"}
    start |= {"command": "megatron-lpr train x.yaml", "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    end = {"time": "2026-11-25T13:00:00.000Z", "start": start["time"], "outcome": "finished"}
    (folder / "ends.jsonl").write_text(json.dumps(end) + "\n")
    roles = {language: "original" if place else "expanded" for place, language in enumerate(languages)}
    recipe = {
        "name": name.encode("utf-8", "replace").decode(),
        "output": str(folder),
        "model": {
            "base": "models/base",
            "num_experts": EXPERTS,
            "num_frozen_experts": 1,
            "topk": 2,
            "dtype": "float32",
        },
        "data": {"manifest": "data/manifest.yaml", "seq_length": 16, "mixture": {"expanded": 0.75, "original": 0.25}},
        "train": {"trainable": "routers", "steps": steps, "global_batch_size": 4},
        "parallel": {"tensor": 2, "pipeline": 1, "context": 1, "expert": 1},
        "optimizer": {"lr": 0.001, "weight_decay": 0.0, **settings},
        "evaluation": {
            "every": every,
            "corpora": [
                {"name": name, "language": name, "role": role, "files": [name]} for name, role in roles.items()
            ],
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder


def record(step: int, steps: int, name: str, languages, every: int) -> dict:
    loss = 2 + math.exp(-step / steps) + 0.1 * math.sin(7.0 * step)
    found = {
        "step": step, "time": "2026-11-25T12:30:00.000Z", "steps": steps, "stage": name,
        "ntp_loss": loss, "ntp_loss_per_language": {language: loss for language in languages},
        "balance_loss": None, "lpr_loss": loss / 4, "grad_norm": 0.5, "lr": 1e-3 * (1 - step / steps), "tokens": 64,
        "tokens_per_second": 1000.0 + step, "tokens_per_language": {language: 32 * step for language in languages},
        "seconds": 0.1, "consumed_samples": 4 * step,
    }  # fmt: skip
    if step in (1, steps) or step % every == 0:
        share = 0.5 * step / steps
        of_layers = {
            "frozen_share": [share] * LAYERS,
            "p0": [share] * LAYERS,
            "load": [[share, 0.5, 0.5 - share]] * LAYERS,
        }
        found["router"] = dict.fromkeys(languages, of_layers)
    if step % every == 0:
        kept = {language: 98 + step / steps for language in languages[1:]}
        found["validation"] = {"bits_per_byte": dict.fromkeys(languages, loss / 2), "retention": kept}
    return found
