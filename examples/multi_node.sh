#!/bin/sh
# The same command on every machine; HOST is one of them, which all of them reach.
#
#     sh examples/multi_node.sh HOST:29400 2 [arguments of ddp_digits.py]
#
# 2 is the number of machines, each with PROCESSES processes (one, if that is not set). If one fails, all are started
# again, and go on from the checkpoint; three times at most, as the peers of one that failed may count as failed, too.
# ADDRESS is this machine's, if the others do not know it by its name.
endpoint=$1 machines=$2
shift 2
# By default the processes meet at a store that outlives a failure, and after one they may look for it in different
# places (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$machines" --nproc-per-node "${PROCESSES:-1}" \
  --rdzv-backend c10d --rdzv-id digits --rdzv-endpoint "$endpoint" ${ADDRESS:+--local-addr "$ADDRESS"} \
  --max-restarts 3 "$(dirname "$0")/ddp_digits.py" "$@"
