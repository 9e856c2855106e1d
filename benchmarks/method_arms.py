"""The arms of benchmarks/method.py: what each of them trains, on which tokens, and from where.

All that post-pretrain read the same samples, and so do all reviews of the same mixture: the data order depends on
corpora, mixture and seed alone.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BASE = "base"
VALIDATION = " (validation)"  # ends the name of a corpus that settings are chosen on
EXPANDED, REPLAYED = ("el", "hu", "tr"), ("en", "es")
GAMMAS = (0.03, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms share, and what was chosen for each kind of them; every field is an option of the command."""

    base: str = "runs/quickstart/base"
    text: str = "runs/method/text"
    dtype: str = "float32"
    tokens: int = 300_000  # of post-pretraining, the same for every arm
    review: float = 0.2  # tokens of review, for each of those
    replay: float = 0.5  # share of the replayed languages in the review
    seq_length: int = 256
    batch: int = 8  # samples of a step
    micro_batch: int = 8
    experts: int = 6
    topk: int = 2
    lr: float = 5e-4  # of stage 1
    dense_lr: float = 5e-4
    full_lr: float = 5e-4
    lora_lr: float = 1e-3
    lora_rank: int = 64
    router_lr: float = 5e-4  # of the review, chosen on validation text: docs/results.md
    gamma: float = 0.1
    window: int = 256
    max_bytes: int = 40_000  # of held-out text, for each corpus

    @property
    def steps(self) -> int:
        return max(2, round(self.tokens / (self.batch * self.seq_length)))

    @property
    def review_steps(self) -> int:
        return max(2, round(self.review * self.steps))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model.

    tree: what its recipe has beside the common one. after: the arm whose checkpoint it starts from.
    """

    name: str
    way: Literal["none", "recipe", "lora"] = "recipe"
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: str | None = None
    group: str = "main"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_").replace("=", "")


def common(settings: Settings, out: Path) -> dict[str, Any]:
    """The recipe under every arm."""
    text = Path(settings.text)

    def corpora(end: str, mark: str = "") -> Iterator[dict[str, Any]]:
        for file in sorted(text.glob(f"*.{end}.jsonl.gz")):
            domain, language, *_ = file.name.split(".")
            role = "expanded" if language in EXPANDED else "original"
            yield {"name": f"{domain}.{language}{mark}", "language": language, "role": role, "files": [str(file)]}

    return {
        "name": "common",
        "output": str(out / "common"),
        "model": {
            "base": settings.base,
            "num_experts": settings.experts,
            "num_frozen_experts": 1,
            "topk": settings.topk,
            "dtype": settings.dtype,
        },
        "data": {"manifest": str(out / "data/manifest.yaml"), "seq_length": settings.seq_length},
        "preprocess": {"output": str(out / "data"), "corpora": list(corpora("train"))},
        "evaluation": {
            "window": settings.window,
            "batch": settings.micro_batch,
            "max_bytes": settings.max_bytes,
            "corpora": [*corpora("heldout"), *corpora("validation", VALIDATION)],
        },
    }


def _post_pretraining(settings: Settings, lr: float, seed: int, **train: Any) -> dict[str, Any]:
    return {
        "data": {"mixture": {"expanded": 1.0}},
        "train": {
            "steps": settings.steps,
            "global_batch_size": settings.batch,
            "micro_batch_size": settings.micro_batch,
            "seed": seed,
            **train,
        },
        "optimizer": {"lr": lr, "min_lr": lr / 10, "warmup_steps": settings.steps // 20},
        "checkpoint": {"final_optimizer": False, "asynchronous": False},
    }


def dense(settings: Settings, lr: float, seed: int = 1234) -> dict[str, Any]:
    return _post_pretraining(settings, lr, seed, trainable="all") | {"model": {"num_experts": 0}}


def full(settings: Settings, lr: float, seed: int = 1234) -> dict[str, Any]:
    return _post_pretraining(settings, lr, seed, trainable="all") | {"balance": {"coeff": 0.02}}


def stage1(settings: Settings, lr: float, seed: int = 1234, **model: Any) -> dict[str, Any]:
    tree = _post_pretraining(settings, lr, seed, trainable="new_experts_and_routers")
    return tree | {"balance": {"coeff": 0.02}, "model": model}


def review(settings: Settings, seed: int = 1234, *, loss: str = "log_softmax", **model: Any) -> dict[str, Any]:
    return {
        "model": model,
        "data": {
            "mixture": {"expanded": 1 - settings.replay, "original": settings.replay},
            "replay": {"max_share": 1.0},  # the paper's 1% of so short a stage 1 would be nothing
        },
        "train": {
            "trainable": "routers",
            "steps": settings.review_steps,
            "global_batch_size": settings.batch,
            "micro_batch_size": settings.micro_batch,
            "seed": seed,
        },
        "lpr": {"coeff": settings.gamma} | ({"loss": loss} if settings.gamma else {}),
        "optimizer": {"lr": settings.router_lr, "min_lr": settings.router_lr / 10, "weight_decay": 0.0},
        "checkpoint": {"final_optimizer": False, "asynchronous": False},
    }


def _with(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, **changes)


def main_arms(settings: Settings, seeds: Sequence[int]) -> Iterator[Arm]:
    """The comparison itself, once for each seed."""
    yield Arm(name=BASE, way="none")
    for number, seed in enumerate(seeds):
        end = f" seed {seed}" if number else ""
        yield Arm(name=f"dense{end}", tree=dense(settings, settings.dense_lr, seed))
        yield Arm(name=f"LoRA{end}", way="lora", tree=dense(settings, settings.lora_lr, seed))
        yield Arm(name=f"MoE, all trained{end}", tree=full(settings, settings.full_lr, seed))
        first = f"stage 1{end}"
        yield Arm(name=first, tree=stage1(settings, settings.lr, seed))
        yield Arm(name=f"review without LPR{end}", tree=review(_with(settings, gamma=0.0), seed), after=first)
        yield Arm(name=f"review, softmax twice{end}", tree=review(settings, seed, loss="double_softmax"), after=first)
        yield Arm(name=f"review{end}", tree=review(settings, seed), after=first)


def gamma_arms(settings: Settings) -> Iterator[Arm]:
    for gamma in GAMMAS:
        yield Arm(name=f"review gamma={gamma:g}", tree=review(_with(settings, gamma=gamma)), after="stage 1")


def rate_arms(settings: Settings) -> Iterator[Arm]:
    """Learning rates of what post-pretrains: each kind of arm is to be compared at its best."""
    for factor in (0.2, 0.4, 2.0):
        yield Arm(name=f"dense lr x{factor:g}", tree=dense(settings, factor * settings.dense_lr))
        yield Arm(name=f"LoRA lr x{factor:g}", way="lora", tree=dense(settings, factor * settings.lora_lr))
        yield Arm(name=f"stage 1 lr x{factor:g}", tree=stage1(settings, factor * settings.lr))
        yield Arm(name=f"MoE, all trained lr x{factor:g}", tree=full(settings, factor * settings.full_lr))


def review_arms(settings: Settings) -> Iterator[Arm]:
    """One setting of the review at a time."""
    for name, values in {"review": (0.05, 0.1, 0.4), "replay": (0.25, 0.75), "router_lr": (2e-3, 5e-3, 2e-2)}.items():
        for value in values:
            tree = review(_with(settings, **{name: value}))
            yield Arm(name=f"review {name}={value:g}", tree=tree, after="stage 1")


def expert_arms(settings: Settings) -> Iterator[Arm]:
    """Other numbers of experts, and of experts that a token goes to: stage 1 and its review."""
    for experts, topk in ((2, 2), (3, 2), (6, 1), (9, 2)):
        end, model = f" experts={experts} topk={topk}", {"num_experts": experts, "topk": topk}
        yield Arm(name=f"stage 1{end}", tree=stage1(settings, settings.lr, **model))
        yield Arm(name=f"review{end}", tree=review(settings, **model), after=f"stage 1{end}")


GROUPS = {"gamma": gamma_arms, "rates": rate_arms, "review": review_arms, "experts": expert_arms}


def arms(settings: Settings, seeds: Sequence[int], groups: Iterable[str]) -> dict[str, Arm]:
    """By name: the comparison, and the groups that vary a setting of it."""
    found = list(main_arms(settings, seeds))
    for group in groups:
        found += [dataclasses.replace(arm, group=group) for arm in GROUPS[group](settings)]
    return {arm.name: arm for arm in found}
