#!/usr/bin/env bash
# NOT RUN ON A CLUSTER. Run one model on the GPUs of two nodes, one process a node.
#
#   sbatch deploy/slurm.sh batch --checkpoint=/shared/llama-2-70b --input=in.jsonl --output=out.jsonl
#   LLAMA_JAX_API_TOKEN=... sbatch deploy/slurm.sh serve --checkpoint=/shared/llama-2-70b --host=0.0.0.0
#
# What follows the script are arguments of llama-jax, the same for every node. The checkpoint is in
# one place for all. A server listens on the first node of the job (`scontrol show hostnames`).
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

# A coordinator must be reached directly: a proxy in the environment can make JAX time out.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

# JAX gives a task of SLURM one GPU, that of its number on the node, unless this names more.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}

# A process that is lost ends all others: none can compute alone. --wait kills what then stays.
exec srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  llama-jax "${@:?arguments of llama-jax, such as serve --checkpoint=DIR}" \
  --devices=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
