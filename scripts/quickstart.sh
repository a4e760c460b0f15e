#!/usr/bin/env bash
# Pretrain a small language model with sharded AdEMAMix: on all GPUs here, else on two CPU ranks.
#   scripts/quickstart.sh [key.sub=value ...]      such as train.steps=50 run.name=short
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare pretrain,wandb
ranks=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
exec .venv/bin/shardopt pretrain --nproc-per-node "$ranks" configs/quickstart.yaml "$@"
