#!/usr/bin/env bash
# Pretrain a small language model with sharded AdEMAMix: on all GPUs here, else on two CPU ranks.
#   scripts/quickstart.sh [key.sub=value ...]      such as train.steps=50 run.name=short
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare pretrain,wandb
ranks=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
# torchrun would set one thread a rank anyway, and say so at length.
cores=$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
exec .venv/bin/torchrun --standalone --nproc_per_node "$ranks" launch/pretrain.py configs/quickstart.yaml "$@"
