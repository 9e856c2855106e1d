#!/bin/bash
# Stage 1, stage 2, export and evaluation as a chain of jobs: each starts when the one before has done its work.
#
#   PARTITION=gpu ACCOUNT=me examples/slurm/submit.sh STAGE1.yaml STAGE2.yaml FOLDER [more words of both trainings]
#   PARTITION=gpu ACCOUNT=me examples/slurm/submit.sh --test-only STAGE1.yaml STAGE2.yaml FOLDER
#
# Everything is written under FOLDER: stage1, stage2, export, export.json and logs. The same command again goes on
# where a chain has ended. --test-only submits nothing, and lets Slurm say whether it would take each job.
set -euo pipefail
shopt -s inherit_errexit # a job that is refused ends this

# --- what differs between sites; set them here, or in the environment ---
ACCOUNT=${ACCOUNT:-}               # empty: the site's default, as with the next two
PARTITION=${PARTITION:-}
QOS=${QOS:-}
TIME=${TIME:-24:00:00}             # of one start of a training; a longer run requeues itself
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}  # and ranks
CPUS_PER_TASK=${CPUS_PER_TASK:-8}
SBATCH_FLAGS=${SBATCH_FLAGS:-}     # further options of sbatch, as "--constraint=h100 --exclude=n7"
SAVE_SECONDS=${SAVE_SECONDS:-300}  # before the time limit, for the last checkpoint

test_only=()
if [[ ${1:-} == --test-only ]]; then
    test_only=(--test-only)
    shift
fi
if (($# < 3)); then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi
stage1=$1 stage2=$2 folder=$3
shift 3
here=$(realpath "$(dirname "$0")")
mkdir -p "$folder/logs"

# submit NAME BEFORE WORDS...: a job that waits for the job BEFORE, if there is one; prints its number
submit() {
    local name=$1 before=$2
    shift 2
    local words=(--parsable --job-name="$name" --output="$folder/logs/%x-%j.log" "${test_only[@]}")
    if [[ $before && ! ${test_only[*]} ]]; then
        # if the job before it fails, a job is cancelled, and does not wait for ever
        words+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
    fi
    [[ ! $ACCOUNT ]] || words+=(--account="$ACCOUNT")
    [[ ! $PARTITION ]] || words+=(--partition="$PARTITION")
    [[ ! $QOS ]] || words+=(--qos="$QOS")
    local flags
    read -ra flags <<<"$SBATCH_FLAGS"
    local answer
    answer=$(sbatch "${words[@]}" "${flags[@]}" "$@")
    echo "${answer%%;*}" # --parsable adds the cluster where there are several
}
train() {
    local name=$1 before=$2
    shift 2
    submit "$name" "$before" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_TASK" --time="$TIME" --signal="B:USR1@$SAVE_SECONDS" "$here/train.sbatch" "$@"
}
single() {
    submit "$1" "$2" --cpus-per-task="$CPUS_PER_TASK" "$here/command.sbatch" "${@:3}"
}

first=$(train stage1 '' "$stage1" --set "output=$folder/stage1" "$@")
second=$(train stage2 "$first" "$stage2" --set "output=$folder/stage2" --set "model.load=$folder/stage1" "$@")
third=$second exported=kept
if [[ ! -e $folder/export ]]; then # it is written whole or not at all
    third=$(single export "$second" export "$folder/stage2" "$folder/export")
    exported=$third
else
    echo "$folder/export is there already and stays as it is: delete it first if stage 2 is to go further" >&2
fi
# the recipe that stage 2 has written: with the words of this command, which its text is read by too
recipe=$folder/stage2/recipe.yaml
fourth=$(single evaluate "$third" evaluate "$folder/export" --recipe "$recipe" --name export --out "$folder/export.json")
if [[ ! ${test_only[*]} ]]; then
    echo "jobs: stage1 $first, stage2 $second, export $exported, evaluate $fourth; their output is in $folder/logs"
fi
