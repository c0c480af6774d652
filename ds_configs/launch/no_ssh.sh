#!/usr/bin/env bash
# Many machines without ssh: start this on every machine, by hand or by whatever starts your jobs.
#
#   NODE=0 MASTER=node1 ds_configs/launch/no_ssh.sh hostfile pretrain_14m      # on node1
#   NODE=1 MASTER=node1 ds_configs/launch/no_ssh.sh hostfile pretrain_14m      # on node2
#
# NODE:    this machine's line in the hostfile, counted from 0. The names in it are not looked up: only how many
#          lines there are and their slots count, and they must be the same on every machine.
# MASTER:  name or address of the machine of line 0, as the others reach it.
# PORT:    a free port of that machine, the same for all (default 29500).
#
# Every machine must be started within PyTorch's 30 minutes. A rank that is lost ends the run on all of them with status
# 69, a signal to any rank with 75; either way the same commands go on from the last checkpoint.
set -euo pipefail
: "${NODE:?number of this machine in the hostfile, from 0}" "${MASTER:?name or address of the machine of line 0}"
hostfile=${1:?usage: NODE=0 MASTER=node1 no_ssh.sh HOSTFILE RECIPE [key.sub=value ...]}
shift

exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE" --master_addr "$MASTER" \
    --master_port "${PORT:-29500}" --module albef_ds.train "$@"
