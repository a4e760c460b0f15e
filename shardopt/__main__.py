"""`python -m shardopt`, which torchrun can start with -m."""

import sys

from shardopt.cli import main

sys.exit(main())
