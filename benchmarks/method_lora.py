"""LoRA on the dense model with peft, on the samples that the other arms read: what users would do instead."""

import math
import shutil
import time
from pathlib import Path

import torch
from torch.nn import functional

from megatron_lpr import api
from megatron_lpr.data.sampler.batches import MicroBatches, RankLayout
from megatron_lpr.platform import device
from megatron_lpr.recipe.settings import Recipe


def train_lora(recipe: Recipe, rank: int, out: Path) -> dict[str, float]:
    """Train adapters of all linear layers by the schedule of `recipe`, a dense one; write the merged model to `out`.

    Adapters are fp32, alpha is twice the rank; the model beneath is in the dtype of the recipe. Returns what it cost.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plan, settings, where = api.plan(recipe), recipe.optimizer, device()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.base, dtype=getattr(torch, recipe.model.dtype))
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.to(where), adapters)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )
    batches = MicroBatches(plan.sampler, RankLayout(micro_batch_size=plan.train.micro_batch_size), consumed_samples=0)
    start, tokens = time.perf_counter(), 0
    for step in range(1, plan.train.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, step)
        optimizer.zero_grad()
        for batch in batches.step(plan.train.global_batch_size)[0]:
            tokens_BS, labels_BS = (torch.from_numpy(array).to(where) for array in (batch.tokens_BS, batch.labels_BS))
            logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
            loss = functional.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten())
            (loss * len(tokens_BS) / plan.train.global_batch_size).backward()
            tokens += tokens_BS.numel()
        torch.nn.utils.clip_grad_norm_(learning, settings.clip_grad)
        optimizer.step()
        if step % 10 == 0 or step == plan.train.steps:
            print(f"LoRA step {step}/{plan.train.steps}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start
    merged = model.float().merge_and_unload()  # in fp32, so that a small change of a weight is not rounded away twice
    merged.save_pretrained(out)
    for file in Path(recipe.model.base).glob("*token*"):
        shutil.copy(file, out)
    trained, below = sum(map(torch.numel, learning)), merged.num_parameters()
    # no weight gradients of what is frozen: 2 operations forward, 2 for the gradient of the input
    return {
        "seconds": seconds,
        "tokens": tokens,
        "flops": tokens * (4.0 * below + 6.0 * trained),
        "trained_parameters": trained,
        "trained_bytes": 4.0 * trained,
    }


def _rate(recipe: Recipe, step: int) -> float:
    """Warm-up and cosine, as the other arms have them."""
    settings, train = recipe.optimizer, recipe.train
    assert train is not None
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / (train.steps - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2
