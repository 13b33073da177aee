#!/bin/bash
# Two nodes on one machine: what `automodel-accel launch slurm` does on a cluster, without one. Each torchrun stands for a node.
# bash two_nodes.sh [PROCESSES_PER_NODE]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

node() {
    "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node "$1" \
        --rdzv-id two-nodes --rdzv-backend c10d --rdzv-endpoint "localhost:$port" \
        "$here/../multi_gpu.py"
}

node "${1:-1}" &
other=$!
trap 'kill "$other" 2> /dev/null || true' EXIT
node "${1:-1}"
wait "$other"
