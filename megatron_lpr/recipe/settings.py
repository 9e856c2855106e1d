"""The recipe: every setting of every command, one frozen dataclass per concern.

A recipe is a YAML file with the sections of `Recipe`; `include: other.yaml` (relative to the including file) puts
another file underneath it. Dotted overrides (`optimizer.lr=1e-4`) come last. Paths inside a recipe are relative to
the working directory.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_lpr.recipe.cluster import ClusterConfig
from megatron_lpr.recipe.fields import MOST_SAMPLES, opt, required
from megatron_lpr.recipe.text_settings import EvaluationConfig, PreprocessConfig

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model and its upcycling."""

    base: str = required(
        "folder of the Hugging Face model (safetensors, config.json, tokenizer): dense, or upcycled before"
    )
    load: str | None = opt(None, "checkpoint folder to start from; without it the weights come from `base`")
    num_experts: int = opt(
        0, "experts of each MoE layer, frozen ones included; 0 keeps the model dense", at_least=0, at_most=10**6
    )
    num_frozen_experts: int = opt(
        1, "experts 0..n-1, never trained: the original FFN first, or all of a base that has experts", at_least=1
    )
    topk: int = opt(2, "experts that each token goes to", at_least=1)
    mlp_only_layers: tuple[int, ...] = opt((), "layers (from 0) that get no experts; Qwen models only", at_least=0)
    router_init_std: float = opt(
        0.02, "standard deviation of a new router, or of the noise on new rows of an old one", at_least=0, at_most=100
    )
    router_init_seed: int = opt(0, "seed of the same", at_least=0)
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "float32", "parameters and activations; `auto`: bfloat16 where the GPU or processor is fast in it"
    )
    spec: Literal["auto", "local", "te"] = opt(
        "auto", "layer modules: Transformer Engine's where it and a GPU are there"
    )
    fused_kernels: Literal["auto", "off"] = opt(
        "auto", "Transformer Engine's and Apex's kernels for router, permutation, RoPE and gradients, where installed"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions; data parallelism is what remains of the world size."""

    tensor: int = opt(1, "tensor-parallel size (sequence parallelism is on above 1)", at_least=1)
    pipeline: int = opt(1, "pipeline-parallel size", at_least=1)
    virtual_pipeline: int = opt(1, "model chunks on each pipeline rank (interleaved schedule above 1)", at_least=1)
    first_stage_layers: int | None = opt(None, "layers of the first stage; without it an equal share", at_least=1)
    last_stage_layers: int | None = opt(None, "layers of the last stage; without it an equal share", at_least=1)
    context: int = opt(1, "context-parallel size: ranks that share every sequence", at_least=1)
    expert: int = opt(1, "expert-parallel size; divides the number of new experts", at_least=1)
    expert_tensor: int = opt(1, "tensor-parallel size inside each new expert", at_least=1)
    dispatcher: Literal["alltoall", "allgather", "flex"] = opt("alltoall", "Megatron token dispatcher")
    frozen: Literal["auto", "replicated", "sharded"] = opt(
        "auto", "frozen weights: a copy on each rank, or gathered when they compute; `auto` shards more than 16 GiB"
    )
    distributed_optimizer: bool = opt(True, "shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = opt(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = opt(False, "gather updated parameters while the next forward pass runs")
    overlap_frozen: Literal["auto", "on", "off"] = opt(
        "auto", "compute frozen experts on a second CUDA stream; `auto`: where tokens travel to new experts meanwhile"
    )


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Linear layers that multiply 8-bit numbers while a model trains; whatever else there is stays as it is."""

    recipe: Literal["none", "tensorwise", "blockwise", "mxfp8"] = opt(
        "none", "what shares a scale: a tensor, 128 numbers of it (weights: 128 x 128), or 32 (Blackwell); none: no FP8"
    )
    format: Literal["auto", "hybrid", "e4m3"] = opt(
        "auto", "`hybrid` has gradients in e5m2, all else in e4m3; `auto` is hybrid for tensorwise, e4m3 otherwise"
    )
    bf16_layers_at_start: int = opt(0, "first layers of the model that stay in bfloat16", at_least=0)
    bf16_layers_at_end: int = opt(0, "last layers of the model that do", at_least=0)
    frozen_weights: Literal["bf16", "fp8"] = opt("bf16", "what frozen weights of linear layers are held in")


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry:
    """A mixture that takes over in the middle of a run."""

    from_sample: int = required("consumed samples from which on it holds", at_least=0, at_most=MOST_SAMPLES)
    mixture: dict[str, float] | None = opt(
        None, "share of the samples of each role; without it data.mixture", at_least=0
    )
    weights: dict[str, float] = opt(
        {}, "weights of corpora inside their role, by name, not the manifest's; 0 leaves a corpus out", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How much there is to replay, and how much of it may be replayed."""

    documents: dict[str, int] = opt(
        {}, "documents that are read, by language or role: a fixed subset, chosen by the seed; default all", at_least=1
    )
    tokens: dict[str, float] = opt(
        {}, "the same as a share of the tokens, as {original: 0.01}; a language has one of the two", above=0, at_most=1
    )
    max_share: float = opt(
        0.01, "original-language tokens that the run may read, as a share of stage 1's; more is refused", at_least=0
    )
    stage1_tokens: int | None = opt(None, "tokens of stage 1; without it those of the run in model.load", at_least=1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    manifest: str = required("manifest of the preprocessed corpora")
    seq_length: int = opt(1024, "tokens of a sample", at_least=1, at_most=1 << 31)
    mixture: dict[str, float] = opt(
        {"expanded": 1.0}, "share of the samples from corpora of each role (expanded, original)", at_least=0
    )
    schedule: tuple[ScheduleEntry, ...] = opt((), "mixtures that take over from data.mixture later in the run")
    windows: Literal["packed", "fixed", "document"] = opt(
        "packed", "samples: consecutive tokens, cut elsewhere in every epoch; always cut alike; or one document each"
    )
    reset_attention: bool = opt(False, "tokens attend to those of their own document only")
    replay: ReplayConfig = opt(ReplayConfig(), "subset and budget of the replay data")
    read_ahead: int = opt(
        2, "micro-batches that a thread reads in advance; 0 reads without a thread", at_least=0, at_most=1024
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How much is trained, and what."""

    trainable: Literal["new_experts_and_routers", "routers", "all"] = required("the parameters that learn")
    steps: int = required("optimizer steps of the whole run", at_least=1)
    global_batch_size: int = opt(512, "samples of one optimizer step", at_least=1)
    micro_batch_size: int = opt(1, "samples of one forward pass on one rank", at_least=1)
    recompute: Recompute = opt("none", "activations recomputed in the backward pass")
    seed: int = opt(1234, "seed of the data order", at_least=0)
    on_not_finite: Literal["stop", "skip", "skip_and_mark"] = opt(
        "stop", "at a loss or gradient that is not finite; `skip_and_mark` writes what the step read to marked.jsonl"
    )
    max_skipped_steps: int = opt(10, "steps that a run may skip over all its starts; one more stops it", at_least=1)
    check_replicas_every: int = opt(
        1000,
        "steps between comparisons of data-parallel ranks' weights, made before each save too; 0: none",
        at_least=0,
    )
    collect_garbage_every: int = opt(
        0,
        "steps between collections of Python's garbage, on all ranks at once; 0: each when Python sees fit",
        at_least=0,
    )
    max_minutes: float = opt(0.0, "minutes after which each start of the run saves and stops; 0: no limit", at_least=0)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Load balancing (stage 1): L += coeff * mean over layers of E * sum_i f_i P_i, arXiv 2408.11396."""

    coeff: float = opt(0.0, "alpha, in the paper's formula: f_i sums to one over the experts, floor 1", at_least=0)
    group: Literal["sequence", "micro_batch"] = opt(
        "sequence", "tokens over which f_i and P_i are taken; `sequence` does not depend on any batch split"
    )


@dataclass(frozen=True, kw_only=True)
class LPRConfig:
    """Language Priors Routing (stage 2): L += coeff * mean over layers and original tokens of -log p_0."""

    coeff: float = opt(0.0, "gamma of the paper", at_least=0)
    loss: Literal["log_softmax", "double_softmax"] = opt(
        "log_softmax", "`double_softmax` is the published code's loss, for reproducing its numbers only"
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warmed-up decay."""

    lr: float = opt(5e-5, "peak learning rate", above=0)
    router_lr: float | None = opt(
        None, "peak learning rate of the routers, on the same schedule; without it `lr`", above=0
    )
    min_lr: float = opt(0.0, "learning rate that the decay would reach one step after the last", at_least=0)
    schedule: Literal["cosine", "linear", "constant"] = opt("cosine", "shape of the decay")
    warmup_steps: int = opt(0, "steps of linear warm-up", at_least=0)
    beta1: float = opt(0.9, "Adam beta1", at_least=0, below=1)
    beta2: float = opt(0.95, "Adam beta2", at_least=0, below=1)
    eps: float = opt(1e-8, "Adam epsilon", at_least=1e-30)
    weight_decay: float = opt(0.1, "decoupled weight decay of matrices", at_least=0)
    clip_grad: float = opt(1.0, "gradient norm limit; 0 does not clip", at_least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Distributed checkpoints under `output`/checkpoints."""

    every: int = opt(0, "steps between checkpoints; 0: the clock decides, and the last step has one", at_least=0)
    every_minutes: float = opt(30.0, "minutes between checkpoints; 0: none by the clock", at_least=0)
    keep: int = opt(2, "newest checkpoints that are kept; 0 keeps all", at_least=0)
    keep_every: int = opt(0, "steps between checkpoints that are kept for good, beside the newest; 0: none", at_least=0)
    asynchronous: bool = opt(True, "train on while a checkpoint is written, from a copy in the hosts' memory")
    final_optimizer: bool = opt(True, "save the optimizer state with the last step too, so that a run can be extended")
    whole: bool = opt(False, "save every weight, those too that the base or the checkpoint in model.load holds")
    verify: bool = opt(
        True,
        "compare the files of a checkpoint with their checksums before it is read; false: their sizes only",
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics: a progress line, JSONL and TensorBoard always."""

    router_every: int = opt(
        1, "steps between summaries of each language's router statistics over the layers", at_least=1
    )
    router_layers_every: int = opt(
        100, "steps between full records of every layer and expert; the first and last step have one too", at_least=1
    )
    wandb: Literal["off", "offline", "online"] = opt("off", "Weights & Biases too, in a project of the run's name")
    profile_from: int = opt(0, "first step that torch.profiler traces into `output`/profile; 0: none", at_least=0)
    profile_to: int = opt(0, "last step of it", at_least=0)
    profile_ranks: tuple[int, ...] = opt((0,), "ranks that are traced", at_least=0)
    stragglers_every: int = opt(100, "steps between records of the slowest rank and of memory; 0: none", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The Hugging Face folder that `export` writes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "`auto` is the dtype that was trained")
    max_shard_size: str = opt("4GB", "largest safetensors file, as 500MB or 4GB")
    results: tuple[str, ...] = opt((), "evaluation results (JSON) for the model card, the base model's first")
    base_model: str | None = opt(
        None, "hub id (organisation/name) of the base for the model card; without it as its folder tells, if it does"
    )
    shared_expert_size: int | None = opt(
        None, "width of the zero shared expert that Qwen2Moe insists on, for a dense base; without it 128", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str = required("name of the run, shown in logs and tables")
    output: str = required("folder of everything that the run writes")
    model: ModelConfig = required("base model and upcycling")
    data: DataConfig | None = opt(None, "training data")
    train: TrainConfig | None = opt(None, "training")
    parallel: ParallelConfig = opt(ParallelConfig(), "parallel sizes")
    fp8: Fp8Config = opt(Fp8Config(), "8-bit products")
    balance: BalanceConfig = opt(BalanceConfig(), "load-balancing loss")
    lpr: LPRConfig = opt(LPRConfig(), "Language Priors Routing loss")
    optimizer: OptimizerConfig = opt(OptimizerConfig(), "optimizer and learning-rate schedule")
    checkpoint: CheckpointConfig = opt(CheckpointConfig(), "checkpoints")
    logging: LoggingConfig = opt(LoggingConfig(), "metrics")
    cluster: ClusterConfig = opt(ClusterConfig(), "machines and jobs")
    evaluation: EvaluationConfig = opt(EvaluationConfig(), "held-out evaluation")
    export: ExportConfig = opt(ExportConfig(), "Hugging Face export")
    preprocess: PreprocessConfig = opt(PreprocessConfig(), "tokenisation")
