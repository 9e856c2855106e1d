"""MoE-LPR in plain PyTorch, written from the method's formulas (arXiv 2408.11396) and nothing else: the oracle.

No expert is dispatched and nothing is fused, sharded or split: every expert runs on every token, every mean is taken
in one place. Weights are a dict of tensors, named below; autograd gives the gradients.

    embed [V, H]   norm [H]   head [V, H] (absent when tied)
    l.norm1 [H]   l.q [N*D, H]   l.k, l.v [G*D, H]   l.o [H, N*D]   l.norm2 [H]
    l.router [E, H]   l.e.gate, l.e.up [F, H]   l.e.down [H, F]          l: layer, e: expert, frozen ones first

Shapes: B sequences, S positions, V vocabulary, H hidden, N heads, G key/value heads, D head size, E experts, F FFN.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the weights do not say themselves."""

    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    num_experts: int
    num_frozen: int = 1
    topk: int = 2
    vocab_size: int = 257
    eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The terms of the loss, and their weighted sum."""

    total: Tensor
    ntp: Tensor
    ntp_of_tag: dict[int, Tensor]  # mean over the positions of one language
    balance: Tensor
    lpr: Tensor


def losses(
    weights: Weights,
    sizes: Sizes,
    *,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    tags_BS: Tensor,
    alpha: float = 0.0,
    gamma: float = 0.0,
    double_softmax: bool = False,
) -> Losses:
    """L = L_NTP + alpha * mean over layers of L_balance + gamma * L_LPR, over one global batch.

    Tags: > 0 original language, < 0 expanded language, 0 padding.
    """
    logits_BSV, router_logits = decoder(weights, sizes, tokens_BS)
    log_p_BS = logits_BSV.log_softmax(-1).gather(-1, labels_BS[..., None])[..., 0]
    ntp = -(log_p_BS * loss_mask_BS).sum() / loss_mask_BS.sum()
    balance = torch.stack([balance_loss(logits, tags_BS, sizes.topk) for logits in router_logits]).mean()
    is_original = tags_BS > 0
    lpr = torch.zeros_like(ntp)
    if is_original.any():
        lpr = torch.stack(
            [lpr_losses(logits, sizes.num_frozen, double_softmax)[is_original].mean() for logits in router_logits]
        ).mean()
    ntp_of_tag = {int(tag): -log_p_BS[tags_BS == tag].mean() for tag in tags_BS.unique() if tag != 0}
    total = ntp + alpha * balance + gamma * lpr
    return Losses(total=total, ntp=ntp, ntp_of_tag=ntp_of_tag, balance=balance, lpr=lpr)


def balance_loss(logits_BSE: Tensor, tags_BS: Tensor, topk: int) -> Tensor:
    """Mean over sequences of E * sum_i f_i P_i."""
    per_sequence = []
    for logits_SE, tags_S in zip(logits_BSE, tags_BS, strict=True):
        p_TE = logits_SE[tags_S != 0].softmax(-1)
        num_tokens, num_experts = p_TE.shape
        slots_E = torch.bincount(p_TE.topk(topk).indices.flatten(), minlength=num_experts)
        f_E = slots_E / (topk * num_tokens)
        per_sequence.append(num_experts * (f_E * p_TE.mean(0)).sum())
    return torch.stack(per_sequence).mean()


def lpr_losses(logits_BSE: Tensor, num_frozen: int, double_softmax: bool) -> Tensor:
    """-log of the frozen experts' probability, of each token."""
    p_BSE = logits_BSE.softmax(-1)
    if double_softmax:
        p_BSE = p_BSE.softmax(-1)
    return -p_BSE[..., :num_frozen].sum(-1).log()


def decoder(weights: Weights, sizes: Sizes, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] and the router logits [B, S, E] of each layer."""
    x_BSH, router_logits = weights["embed"][tokens_BS], []
    for layer in range(sizes.num_layers):
        h_BSH = rms_norm(x_BSH, weights[f"{layer}.norm1"], sizes.eps)
        x_BSH = x_BSH + attention(weights, sizes, layer, h_BSH)
        h_BSH = rms_norm(x_BSH, weights[f"{layer}.norm2"], sizes.eps)
        y_BSH, logits_BSE = experts(weights, sizes, layer, h_BSH)
        x_BSH = x_BSH + y_BSH
        router_logits.append(logits_BSE)
    x_BSH = rms_norm(x_BSH, weights["norm"], sizes.eps)
    return x_BSH @ weights.get("head", weights["embed"]).T, router_logits


def experts(weights: Weights, sizes: Sizes, layer: int, h_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """y = sum over the top-k of p_i / (sum of the top-k's p) * FFN_i(h), and the router's logits."""
    logits_BSE = h_BSH @ weights[f"{layer}.router"].T
    p_BSE = logits_BSE.softmax(-1)
    chosen_BSE = torch.zeros_like(p_BSE).scatter(-1, p_BSE.topk(sizes.topk).indices, 1.0)
    gates_BSE = p_BSE * chosen_BSE
    gates_BSE = gates_BSE / gates_BSE.sum(-1, keepdim=True)
    y_BSH = torch.zeros_like(h_BSH)
    for e in range(sizes.num_experts):
        gate, up, down = (weights[f"{layer}.{e}.{name}"] for name in ("gate", "up", "down"))
        a_BSF, b_BSF = h_BSH @ gate.T, h_BSH @ up.T
        y_BSH = y_BSH + gates_BSE[..., e, None] * ((a_BSF * a_BSF.sigmoid() * b_BSF) @ down.T)
    return y_BSH, logits_BSE


def attention(weights: Weights, sizes: Sizes, layer: int, h_BSH: Tensor) -> Tensor:
    """Causal attention with rotary positions; each key/value head serves num_heads / num_groups query heads."""
    batch, length, _ = h_BSH.shape

    def heads(name: str) -> Tensor:
        return (h_BSH @ weights[f"{layer}.{name}"].T).view(batch, length, -1, sizes.head_dim).transpose(1, 2)

    q_BNSD, k_BGSD, v_BGSD = rotary(heads("q"), sizes), rotary(heads("k"), sizes), heads("v")
    outputs = []
    for head in range(sizes.num_heads):
        group = head // (sizes.num_heads // sizes.num_groups)
        scores_BSS = q_BNSD[:, head] @ k_BGSD[:, group].transpose(1, 2) / sizes.head_dim**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs.append(scores_BSS.masked_fill(later, -torch.inf).softmax(-1) @ v_BGSD[:, group])
    return torch.cat(outputs, -1) @ weights[f"{layer}.o"].T


def rotary(x_BNSD: Tensor, sizes: Sizes) -> Tensor:
    """Rotates (x_i, x_{i + D/2}) at position s by the angle s * theta^(-2i/D)."""
    half = sizes.head_dim // 2
    speed = sizes.rope_theta ** (-torch.arange(half, dtype=x_BNSD.dtype) * 2 / sizes.head_dim)
    angle_SD = torch.arange(x_BNSD.shape[2], dtype=x_BNSD.dtype)[:, None] * speed
    a, b = x_BNSD[..., :half], x_BNSD[..., half:]
    return torch.cat([a * angle_SD.cos() - b * angle_SD.sin(), b * angle_SD.cos() + a * angle_SD.sin()], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def from_megatron(tensors: Mapping[str, Tensor], sizes: Sizes) -> Weights:
    """Parameters, or their gradients, of a whole Megatron model by the names above, in fp64."""
    weights: Weights = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().double()
        match name.split("."):
            case ["embedding", "word_embeddings", "weight"]:
                weights["embed"] = tensor[: sizes.vocab_size]
            case ["output_layer", "weight"]:
                weights["head"] = tensor[: sizes.vocab_size]
            case ["decoder", "final_layernorm", "weight"]:
                weights["norm"] = tensor
            case ["decoder", "layers", layer, *rest]:
                weights |= {f"{layer}.{key}": value for key, value in _layer(".".join(rest), tensor, sizes).items()}
            case _:
                raise AssertionError(f"unknown parameter {name}")
    return {name: weight.clone() for name, weight in weights.items()}


def _layer(name: str, tensor: Tensor, sizes: Sizes) -> Weights:
    plain = {
        "input_layernorm.weight": "norm1",
        "pre_mlp_layernorm.weight": "norm2",
        "self_attention.linear_proj.weight": "o",
        "mlp.router.weight": "router",
    }
    if name in plain:
        return {plain[name]: tensor}
    if name == "self_attention.linear_qkv.weight":
        # one block per key/value head: its query heads, the key, the value
        per_group = sizes.num_heads // sizes.num_groups
        blocks = tensor.view(sizes.num_groups, per_group + 2, sizes.head_dim, -1)
        q, k, v = blocks[:, :per_group], blocks[:, per_group], blocks[:, per_group + 1]
        return {key: x.reshape(-1, tensor.shape[1]) for key, x in (("q", q), ("k", k), ("v", v))}
    *module, linear, _ = name.split(".")
    match module:
        case ["mlp"]:
            number = 0  # a dense FFN is the only expert
        case ["mlp", "frozen_experts", expert]:
            number = int(expert)
        case ["mlp", "experts", "local_experts", expert]:
            number = sizes.num_frozen + int(expert)
    if linear == "linear_fc2":
        return {f"{number}.down": tensor}
    gate, up = tensor.chunk(2)
    return {f"{number}.gate": gate, f"{number}.up": up}
