#!/usr/bin/env bash
# torchrun in place of the deepspeed launcher, where a platform expects it (Kubernetes, cloud services). On every machine:
#
#   NODES=2 NODE=0 MASTER=node1 ds_configs/launch/torchrun.sh pretrain_14m      # on node1
#   NODES=2 NODE=1 MASTER=node1 ds_configs/launch/torchrun.sh pretrain_14m      # on node2
#
# NODES: machines (1); NODE: this one's number (0); MASTER, PORT: of machine 0; GPUS: processes of each (its GPUs).
#
# --max-restarts 0: a run that was asked to end leaves with status 75, which torchrun would take for a failure and start
# again. Its own status is 1 whatever the ranks' are; stopped.json in output_dir says that the run may go on.
# SIGTERM to torchrun reaches the ranks; SIGUSR1 does not, and kills torchrun: send it to a rank.
set -euo pipefail

exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${GPUS:-gpu}" --max-restarts 0 \
    --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29500}" --module albef_ds.train "$@"
