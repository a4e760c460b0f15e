"""torchrun's target: `torchrun --nproc_per_node N launch/pretrain.py CONFIG [key.sub=value ...]`."""

import sys

from shardopt.cli import main

if __name__ == "__main__":
    sys.exit(main(command="pretrain"))
