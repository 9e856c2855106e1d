# shellcheck shell=bash
# NOT RUN HERE: written from the manuals of pyxis and Apptainer; the project's machines have neither.
# Puts the ranks into a container, where CONTAINER_IMAGE names one. It must have megatron-lpr on its PATH.
#
#   CONTAINER_IMAGE=/images/lpr.sqsh   for pyxis (srun --container-image): a file, or a name in a registry
#   CONTAINER_IMAGE=/images/lpr.sif    for Apptainer, by the end of its name
#   CONTAINER_MOUNTS=/data,/models     folders of the host, under the same names; the working folder is always there
#
# Sourced by the scripts; sets `container`, the words between srun's own options and the command.
folders=("$PWD")
IFS=, read -ra more <<<"${CONTAINER_MOUNTS:-}"
folders+=("${more[@]}")
container=()
if [[ $CONTAINER_IMAGE == *.sif ]]; then
    container=(apptainer exec --nv --pwd "$PWD") # --nv: the host's driver and its GPUs
    for folder in "${folders[@]}"; do
        container+=(--bind "$folder")
    done
    container+=("$CONTAINER_IMAGE")
else
    mounts=$(for folder in "${folders[@]}"; do printf ',%s:%s' "$folder" "$folder"; done)
    container=("--container-image=$CONTAINER_IMAGE" "--container-mounts=${mounts#,}" "--container-workdir=$PWD")
fi
