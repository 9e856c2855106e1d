"""The method as one would write it with Hugging Face's modules: the baseline of benchmarks/train_step.py.

The MoE layer is the loop over experts of transformers 4's MixtralSparseMoeBlock, the model a plain Llama or Qwen 2 with
PyTorch's attention, the loss a cross-entropy of all logits in fp32; what a stage freezes has requires_grad False, and
the optimizer is torch's AdamW (foreach) on the weights themselves, without fp32 copies.

Shapes: B sequences, S positions, T = B*S, H hidden, E experts, K = top-k, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lpr.families import Architecture
from megatron_lpr.model.rope import inverse_frequencies
from megatron_lpr.recipe.settings import Recipe


class Attention(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = arch.num_attention_heads, arch.num_query_groups, arch.head_dim
        hidden, bias = arch.hidden_size, arch.qkv_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

        queries = rotated(split(self.q_proj(x_BSH), self.heads), cos, sin)
        keys = rotated(split(self.k_proj(x_BSH), self.groups), cos, sin)
        values = split(self.v_proj(x_BSH), self.groups)
        repeats = self.heads // self.groups
        keys, values = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (keys, values))
        output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.o_proj(output.transpose(1, 2).reshape(*x_BSH.shape[:2], -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(arch.hidden_size, arch.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(arch.ffn_hidden_size, arch.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoeBlock(nn.Module):
    """Attributes: `logits_TE` of the last forward pass; `frozen_slots`, those that expert 0 got so far."""

    def __init__(self, arch: Architecture, num_experts: int, topk: int) -> None:
        super().__init__()
        self.num_experts, self.topk = num_experts, topk
        self.gate = nn.Linear(arch.hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(arch) for _ in range(num_experts))
        self.frozen_slots: Tensor | int = 0

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.view(-1, x_BSH.shape[-1])
        self.logits_TE = self.gate(x_TH)
        weights_TE = F.softmax(self.logits_TE, dim=1, dtype=torch.float)
        weights_TK, chosen_TK = torch.topk(weights_TE, self.topk, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(x_TH.dtype)
        self.frozen_slots = self.frozen_slots + (chosen_TK == 0).sum()
        output_TH = torch.zeros_like(x_TH)
        mask_EKT = F.one_hot(chosen_TK, num_classes=self.num_experts).permute(2, 1, 0)
        for index in mask_EKT.sum(dim=(-1, -2)).nonzero():
            slot, tokens = torch.where(mask_EKT[index].squeeze(0))
            states = x_TH[None, tokens].reshape(-1, x_TH.shape[-1])
            output_TH.index_add_(0, tokens, self.experts[index](states) * weights_TK[tokens, slot, None])
        return output_TH.view_as(x_BSH)


class Layer(nn.Module):
    def __init__(self, arch: Architecture, num_experts: int, topk: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.self_attn = Attention(arch)
        self.post_attention_layernorm = nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.mlp = SparseMoeBlock(arch, num_experts, topk) if num_experts else MLP(arch)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), cos, sin)
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class PlainModel(nn.Module):
    """A causal language model of a recipe, with what the recipe freezes frozen."""

    def __init__(self, recipe: Recipe, arch: Architecture) -> None:
        super().__init__()
        self.recipe, model = recipe, recipe.model
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Layer(arch, model.num_experts, model.topk) for _ in range(arch.num_layers))
        self.norm = nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        if arch.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        frequencies = inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
        self.register_buffer("frequencies", frequencies.to(self.norm.weight.device), persistent=False)
        assert recipe.train is not None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_learns(name, recipe.train.trainable))

    @property
    def moe_blocks(self) -> list[SparseMoeBlock]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMoeBlock)]

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor, tags_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and the next-token loss in it."""
        x_BSH = self.embed_tokens(tokens_BS)
        angles = torch.arange(tokens_BS.shape[1], device=x_BSH.device)[:, None] * self.frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x_BSH.dtype), angles.sin().to(x_BSH.dtype)
        for layer in self.layers:
            x_BSH = layer(x_BSH, cos, sin)
        logits_TV = self.lm_head(self.norm(x_BSH)).float().flatten(0, 1)
        losses_T = F.cross_entropy(logits_TV, labels_BS.flatten(), reduction="none")
        ntp = (losses_T * mask_BS.flatten()).sum() / mask_BS.sum()
        loss = ntp
        if self.recipe.balance.coeff:
            loss = loss + self.recipe.balance.coeff * self._balance_loss()
        if self.recipe.lpr.coeff:
            loss = loss + self.recipe.lpr.coeff * self._lpr_loss(tags_BS.flatten() > 0)
        return loss, ntp.detach()

    def _balance_loss(self) -> Tensor:
        """transformers' load_balancing_loss_func, over all layers at once."""
        probs_TE = torch.cat([block.logits_TE for block in self.moe_blocks]).softmax(-1, dtype=torch.float)
        num_experts, topk = probs_TE.shape[1], self.recipe.model.topk
        chosen_TKE = F.one_hot(probs_TE.topk(topk, dim=-1).indices, num_experts)
        share_E = chosen_TKE.float().mean(dim=(0, 1))
        return num_experts * (share_E * probs_TE.mean(dim=0)).sum()

    def _lpr_loss(self, original_T: Tensor) -> Tensor:
        losses_NT = torch.stack([-block.logits_TE.float().log_softmax(-1)[:, 0] for block in self.moe_blocks])
        return (losses_NT * original_T).sum() / original_T.sum().clamp(min=1) / len(losses_NT)


def _learns(name: str, trainable: str) -> bool:
    if trainable == "all":
        return True
    is_router, is_new = ".mlp.gate." in name, ".mlp.experts." in name and ".mlp.experts.0." not in name
    return is_router or (is_new and trainable == "new_experts_and_routers")
