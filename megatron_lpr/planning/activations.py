"""What the forward pass of one micro-batch saves for the backward pass, layer by layer.

The terms are those of the modules that this project builds, with Transformer Engine or without, on CUDA or on a CPU,
where a norm keeps its input in fp32 and SwiGLU is not fused. They differ from those of a model that trains wholly
(Korthikanti et al., arXiv 2205.05198): a frozen linear layer does not keep its input, for its weight has no gradient.

Shapes: T tokens of this rank, of a micro-batch, between tensor-parallel regions; W tokens inside them; H hidden, F FFN
width, Q and K channels of queries and of keys, D of a head.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_lpr.families import Architecture
from megatron_lpr.files.safetensors_io import torch_dtype
from megatron_lpr.model.parameters import is_trainable
from megatron_lpr.recipe.settings import Recipe, TrainConfig

Device = Literal["cuda", "cpu"]
_FP32, _INDEX = 4, 8


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, of the local modules or Transformer Engine's.

    train: in place of the recipe's.
    te: attention keeps keys and values once for all queries that share them.
    """

    recipe: Recipe
    arch: Architecture
    train: TrainConfig
    device: Device = "cuda"
    te: bool = False

    @property
    def itemsize(self) -> int:
        return torch_dtype(self.recipe.model.dtype).itemsize

    @property
    def wide_tokens(self) -> int:
        assert self.recipe.data is not None
        return self.train.micro_batch_size * self.recipe.data.seq_length // self.recipe.parallel.context

    @property
    def tokens(self) -> int:
        return self.wide_tokens // self.recipe.parallel.tensor

    @property
    def hidden(self) -> int:
        """The states between two layers."""
        return self.tokens * self.arch.hidden_size * self.itemsize

    @property
    def wide_hidden(self) -> int:
        """The same inside a tensor-parallel region."""
        return self.hidden * self.recipe.parallel.tensor

    def learns(self, name: str) -> bool:
        return is_trainable(name, self.train.trainable)

    def layer(self, *, has_experts: bool, below_learns: bool) -> int:
        """Of a layer that is not recomputed.

        below_learns: whether the layer's input needs a gradient.
        """
        return self.attention(below_learns) + self.ffn(has_experts=has_experts, below_learns=below_learns)

    def saved(self, *, has_experts: bool, below_learns: bool) -> int:
        """Of a layer, as `train.recompute` has it."""
        recompute = self.train.recompute
        if recompute == "full":
            return self.hidden
        if recompute == "selective":
            # what a layer without experts recomputes is `mlp`, in a dense model alone
            again = has_experts or not self.recipe.model.num_experts
            kept = self.norm(below_learns) + self.hidden
            return self.attention(below_learns) + (kept if again else self.ffn(has_experts=False, below_learns=True))
        return self.layer(has_experts=has_experts, below_learns=below_learns)

    def computed_again(self, *, has_experts: bool) -> int:
        """What recomputation of a layer holds, while its backward pass runs."""
        kept = self.saved(has_experts=has_experts, below_learns=True)
        mask = self._mask_of_documents() if self.train.recompute == "full" else 0
        return self.layer(has_experts=has_experts, below_learns=True) - kept + mask

    def norm(self, below_learns: bool, tokens: int | None = None, width: int | None = None) -> int:
        """An RMSNorm keeps its input and the inverse of its root mean square."""
        if not below_learns and not self.learns("layernorm"):
            return 0
        tokens, width = tokens or self.tokens, width or self.arch.hidden_size
        if self.device == "cuda":
            return tokens * (width * self.itemsize + _FP32)
        return tokens * (width * (1 + self.learns("layernorm")) + 1) * _FP32

    def attention(self, below_learns: bool) -> int:
        arch, size = self.arch, self.itemsize
        learns = self.learns("self_attention.")
        if not below_learns and not learns:
            return 0
        tensor, wide = self.recipe.parallel.tensor, self.wide_tokens
        queries, keys = arch.shape("QK")
        repeated = keys if self.te else queries
        # queries, keys, values, the output, the logarithm of each softmax's sum
        core = wide // tensor * (2 * queries * size + arch.num_attention_heads * _FP32)
        core += wide // tensor * 2 * repeated * size * self._seen_by_queries(is_repeated=queries != keys) // 2
        core += wide // tensor * self._kept_by_a_view() * size
        rotations = 4 * wide * arch.head_dim * size  # cosines and sines, for queries and keys
        if self.train.micro_batch_size > 1:
            rotations //= self.train.micro_batch_size
        found = self.norm(below_learns) + core + rotations
        if arch.qk_norm:
            found += self._normed_heads(arch.num_attention_heads // tensor)
            found += self._normed_heads(arch.num_query_groups // tensor)
        if learns:  # the inputs of both linear layers; that of the second one is a view of the output, but for parts
            found += self.hidden + (wide // tensor * queries * size if self._attends_in_parts() else 0)
        return found

    def _attends_in_parts(self) -> bool:
        """Whose outputs are joined: of a context-parallel rank, or of windows (model/attention.py)."""
        assert self.recipe.data is not None
        window = self.arch.sliding_window
        is_windowed = window is not None and window < self.recipe.data.seq_length and not self.te
        return self.recipe.parallel.context > 1 or is_windowed

    def _kept_by_a_view(self) -> int:
        """Channels that nobody keeps for themselves: queries, keys and values are computed as one tensor, and a view of
        some keeps them all. Where a rank has several groups those of a kind do not lie together: queries are copied out
        where a group has more than one, and heads that are normed together.
        """
        arch = self.arch
        queries, keys = arch.shape("QK")
        if self.te:  # whose modules copy what does not lie together
            return 0
        shares_none, has_one_group = queries == keys, arch.num_query_groups == self.recipe.parallel.tensor
        viewed = keys if shares_none and self.recipe.parallel.context == 1 else 0  # values, which are not repeated
        if arch.qk_norm and (self.device == "cuda" or self.itemsize == _FP32):
            across = arch.qk_norm_across_heads
            viewed += keys if has_one_group or not across else 0
            viewed += queries if has_one_group or (shares_none and not across) else 0
        return queries + 2 * keys - viewed if viewed else 0

    def _normed_heads(self, heads: int) -> int:
        """Of queries or keys."""
        wide, channels = self.wide_tokens, heads * self.arch.head_dim
        if not self.arch.qk_norm_across_heads:
            return self.norm(True, wide * heads, self.arch.head_dim)
        if self.recipe.parallel.tensor == 1:
            return self.norm(True, wide, channels)
        return wide * (channels * self.itemsize + _FP32)  # model/norms.py

    def _seen_by_queries(self, *, is_repeated: bool) -> int:
        """Keys that are kept, in halves of a context-parallel rank's own.

        Of c ranks one has chunks r and 2c - 1 - r of 2c, and gathers for each what comes before (model/attention.py).
        """
        context = self.recipe.parallel.context
        if context == 1 or self.te:
            return 2
        return 2 * context + 1 if is_repeated else 2 * context

    def handed_over(self) -> int:
        """To all layers of a model chunk: the mask of documents, and tags, which full recomputation keeps."""
        return self._mask_of_documents() + (self.wide_tokens * _INDEX if self.train.recompute == "full" else 0)

    def _mask_of_documents(self) -> int:
        """Positions x those that they might see; a context-parallel rank's two chunks see all but half a chunk's worth
        of the sequence (model/attention.py).
        """
        assert self.recipe.data is not None
        if not self.recipe.data.reset_attention or self.te:
            return 0
        context, length = self.recipe.parallel.context, self.recipe.data.seq_length
        seen = length if context == 1 else length // (4 * context) * (2 * context + 1)
        return self.wide_tokens * seen * self.itemsize

    def angles(self) -> int:
        """Of rotary embeddings, which it keeps once."""
        positions = self.wide_tokens // self.train.micro_batch_size
        return positions * self.arch.head_dim * _FP32 if self.train.recompute == "full" else 0

    def ffn(self, *, has_experts: bool, below_learns: bool) -> int:
        if self.recipe.model.num_experts and has_experts:
            experts = self.router() + self.frozen_experts(below_learns) + self.new_experts(below_learns)
            return self.norm(below_learns or self.arch.norm_after) + experts
        if not below_learns and not self.learns("mlp.linear"):
            return 0
        width = self.wide_tokens * self.arch.ffn_hidden_size // self.recipe.parallel.tensor
        kept = self._swiglu(width, learns=self.learns("mlp.linear"))
        return self.norm(below_learns) + kept + (self.hidden if self.learns("mlp.linear") else 0)

    def router(self) -> int:
        """Its input, and small things for each token and expert."""
        model, recipe = self.recipe.model, self.recipe
        losses = (1 if recipe.balance.coeff else 0) + (1 if recipe.lpr.coeff else 0)
        new = model.num_experts - model.num_frozen_experts
        small = model.topk * (_INDEX + _FP32) + losses * model.num_experts * _FP32 + new * (1 + _FP32)
        return self.hidden + self.tokens * small

    def frozen_experts(self, below_learns: bool) -> int:
        """Of the tokens that go there; only their outputs where nothing below learns."""
        slots, arch = self.slots(frozen=True), self.arch
        found = slots * (self.itemsize + arch.hidden_size * self.itemsize)
        found += self.recipe.model.num_frozen_experts * self.tokens * _INDEX  # the order in which tokens are chosen
        learns = self.learns(".mlp.frozen_experts.")
        if below_learns or learns:
            parts = 3 if self.device == "cpu" else 2  # both halves, and silu of one where no kernel does both
            found += parts * slots * arch.ffn_hidden_size * self.itemsize
        if learns:
            found += slots * (arch.hidden_size + arch.ffn_hidden_size) * self.itemsize
        return found

    def new_experts(self, below_learns: bool) -> int:
        """Of the tokens that come here; their probabilities always need a gradient."""
        sizes, learns = self.recipe.parallel, self.learns(".mlp.experts.")
        sent = self.slots(frozen=False)
        received = sent * sizes.expert_tensor
        width = received * self.arch.ffn_hidden_size // sizes.expert_tensor
        found = sent * _INDEX + received * _FP32
        if below_learns or learns:
            found += self._swiglu(width, learns=learns)
        else:
            found += width * self.itemsize * (1 if self.device == "cpu" else 2)
        return found + (received * self.arch.hidden_size * self.itemsize if learns else 0)

    def _swiglu(self, elements: int, *, learns: bool) -> int:
        """Both halves of its input; and what the next linear layer keeps of its output, where it learns."""
        parts = 2 + learns
        if self.device == "cpu":  # silu of one half; what is weighted, or the other half plus Megatron's offset of 0
            parts += 2
        return parts * elements * self.itemsize

    def slots(self, *, frozen: bool) -> int:
        """Routing slots of this rank's tokens that go to frozen experts, or to new ones: spread evenly over all."""
        model = self.recipe.model
        of_frozen = self.tokens * model.topk * model.num_frozen_experts // model.num_experts
        return of_frozen if frozen else self.tokens * model.topk - of_frozen
