# shellcheck shell=bash
# The environment of the ranks, sourced by the scripts. What is set already stays: a site's module, or `sbatch --export`.
# Lines that a site has to decide upon are comments.

# --- where the ranks meet ---
# The first node. Its address comes from Slurm, for names of nodes do not resolve everywhere.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node -o "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
# A port of the job's own, so that two jobs on one node do not meet each other.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Rank, local rank and number of ranks are srun's: SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS.

# --- time ---
# When the job's time ends, in seconds since 1970: megatron-lpr saves and stops before. Newer Slurms set it; for others, and
# for containers that cannot ask, it is asked for here.
end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p' | head -n1)
if end=$(date -d "$end" +%s 2>/dev/null); then # not for a job without a limit
    export SLURM_JOB_END_TIME=$end
fi

# --- processors ---
# srun does not take --cpus-per-task over from sbatch since Slurm 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Threads of a rank's CPU work. Training needs none; without it every rank would take all cores of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A line is in the log when it is printed, not when four kilobytes are full.
export PYTHONUNBUFFERED=1

# --- CUDA ---
# Kernels start in the order of launch, on which Megatron relies to overlap communication with tensor and sequence parallelism.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Memory that is freed in pieces is used again in other pieces: less lost to fragments where batches differ.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# --- NCCL ---
# Warnings name the network or the rank at fault; INFO also tells what NCCL chose, for a first run on a cluster.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The interface of the first contact, where the first one that NCCL finds leads nowhere (docker0, a management network).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# The InfiniBand cards that belong to the GPUs, where a node has others, for storage.
# export NCCL_IB_HCA=mlx5
# A collective that fails or times out ends its process (3, torch's own choice), and so the job.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# The last collectives of each rank are kept, and written to files when one times out: who waited for whom. (Torch before
# 2.9 calls the first and the last TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE.)
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$PWD/nccl_trace_${SLURM_JOB_ID}_rank}

# --- caches ---
# Compiled kernels: on the node's own disk (TMPDIR, or the system's place for temporary files), for hundreds of ranks in
# one folder of a shared home wait for each other.
local_disk=$(dirname "$(mktemp -u)")
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local_disk/megatron-lpr-$UID/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$local_disk/megatron-lpr-$UID/inductor}
# The base model and its tokenizer are a folder; nothing is looked for on the hub, which nodes often cannot reach.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Where libraries of Hugging Face put what they make: not into a home with a quota.
# export HF_HOME=/scratch/$USER/huggingface
