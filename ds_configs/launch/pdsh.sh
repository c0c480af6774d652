#!/usr/bin/env bash
# Many machines with ssh: start this on the first of them. It starts the others through pdsh.
#
#   ds_configs/launch/pdsh.sh hostfile pretrain_14m
#
# Needs: passwordless ssh to every host of the hostfile (this one too), pdsh here, and the same checkout, environment and
# data under the same paths everywhere. The launcher passes on variables that begin with NCCL, PYTHON, UCX, MV2 or MLFLOW;
# anything else (GLOO_SOCKET_IFNAME, TORCH_NCCL_..., OMP_NUM_THREADS) goes into ~/.deepspeed_env, a line NAME=value each.
#
# To stop: `kill -USR1` to one process of `albef_ds.train` on any host. All save and end with 75, which this script returns.
# SIGTERM or Ctrl-C here ends the connections and asks the launchers of the other hosts to end their ranks (so DeepSpeed's
# source, 0.19.8): do not count on a checkpoint of that moment.
set -euo pipefail
hostfile=${1:?usage: pdsh.sh HOSTFILE RECIPE [key.sub=value ...]}
shift

exec deepspeed --hostfile "$hostfile" --launcher pdsh --module albef_ds.train "$@"
