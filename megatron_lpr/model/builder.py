"""This rank's model chunks: Megatron GPTModels, dense or upcycled."""

from collections.abc import Iterable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import unwrap_model

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.losses import GlobalCounts
from megatron_lpr.model.layer_specs import block_spec
from megatron_lpr.model.lpr_router import LPRRouter
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.model.rope import inverse_frequencies
from megatron_lpr.model.router_stats import NotYetSummed
from megatron_lpr.model.transformer_config import transformer_config
from megatron_lpr.model.vocabulary import TrueVocabGPTModel
from megatron_lpr.platform import on_leave
from megatron_lpr.platform.distributed import gloo_told
from megatron_lpr.platform.fp8 import fp8_state_manager
from megatron_lpr.recipe.checks import use_transformer_engine
from megatron_lpr.recipe.settings import ParallelConfig, Recipe


def init_model_parallel(sizes: ParallelConfig, timeout_minutes: float = 30.0) -> None:
    """Megatron's process groups (needs the default group) and its CUDA generator states.

    Args:
        timeout_minutes: of the collectives in these groups.

    Raises:
        UserError: there is no default group, another model is there already, or gloo cannot make the groups.
    """
    if not torch.distributed.is_initialized():
        raise UserError("this process is no rank of a run: make a Trainer in `with session(plan)`, or call train(plan)")
    if parallel_state.model_parallel_is_initialized():
        raise UserError("this session has a Trainer already, and a process can have one: make a session for each")
    with gloo_told():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
            context_parallel_size=sizes.context,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=sizes.expert_tensor,
            distributed_timeout_minutes=timeout_minutes,
        )
    model_parallel_cuda_manual_seed(0)  # nothing here draws numbers: no dropout, no random initialisation


def build_model(recipe: Recipe, arch: Architecture) -> list[torch.nn.Module]:
    """Build the chunks of this pipeline rank with uninitialised weights: load_dense or a checkpoint fills them."""
    te = use_transformer_engine(recipe.model.spec)
    if te:
        _forget_fp8_with_the_layout()
    config = transformer_config(recipe, arch, te)
    virtual = recipe.parallel.virtual_pipeline
    counts, not_yet_summed = GlobalCounts(), NotYetSummed()
    chunks: list[torch.nn.Module] = []
    for stage in range(virtual):
        vp_stage = stage if virtual > 1 else None
        chunk = TrueVocabGPTModel(
            config,
            block_spec(config, arch, te, vp_stage),
            vocab_size=padded_vocab_size(arch.vocab_size, recipe.parallel.tensor),
            true_vocab_size=arch.vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        frequencies = inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
        chunk.rotary_pos_emb.inv_freq = frequencies.to(torch.cuda.current_device())
        # Megatron remembers what it has computed by the module, which holds a process group and with it gloo's threads
        on_leave(type(chunk.rotary_pos_emb).forward.cache_clear)
        for router in routers(chunk):
            router.counts, router.stats.not_yet = counts, not_yet_summed
        if config.recompute_granularity and chunk.pre_process:
            # a checkpointed block whose input needs no gradient has no backward, and a frozen embedding's output needs
            # none: the layers' weights would be left without their gradients
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        chunks.append(chunk)
    return chunks


def _forget_fp8_with_the_layout() -> None:
    """Transformer Engine keeps FP8 maxima of every module that ever ran, and would reduce them in groups now gone."""
    on_leave(fp8_state_manager().reset)


def named_weights(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters, wrapped or not, with the layer's number in the model and not in the pipeline stage."""
    prefix = "decoder.layers."
    for chunk in chunks:
        model = unwrap_model(chunk)
        first_layer = model.decoder.layers[0].layer_number - 1
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                number, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{int(number) + first_layer}.{rest}"
            yield name, parameter


def routers(*chunks: torch.nn.Module) -> list[LPRRouter]:
    """The routers of some model chunks, in layer order."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, LPRRouter)]


def global_counts(*chunks: torch.nn.Module) -> GlobalCounts:
    """The denominators that the routers of these chunks share (a fresh object for a dense model)."""
    found = routers(*chunks)
    return found[0].counts if found else GlobalCounts()
