#!/bin/bash
# In the place of `megatron-lpr train RECIPE`: counts to COUNT (30) in a file per rank and goes on where it was. Asked to stop,
# it ends with status 75, each rank a little later than the one before, so that a script that lets one end kill the
# others is found out. With "fail" in the place of RECIPE the last rank ends with status 9, and the others after it.
asked=''
trap 'asked=yes' USR1 TERM
rank=$SLURM_PROCID
count=$(cat "count-$rank" 2>/dev/null || echo 0)
echo "$* from $count"
while ((count < ${COUNT:-30})); do
    sleep 0.1 &
    wait $! # a signal ends this, as it would not a sleep in front
    echo $((++count)) >"count-$rank"
    if [[ $asked ]]; then
        sleep "0.$rank"
        exit 75
    fi
    if [[ $2 == fail && $count == 3 ]]; then
        ((rank == SLURM_NTASKS - 1)) && exit 9
        exit 1
    fi
done
