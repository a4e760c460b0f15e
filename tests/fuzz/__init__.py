"""Property tests: inputs that nobody thought of, made by hypothesis. A file per floor.

In CI few examples, always the same; `scripts/fuzz.py` asks for many and others.
"""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

FACTOR = int(os.environ.get("SHARDOPT_FUZZ", "0"))
"""Times as many examples as in CI, from the seed that `--hypothesis-seed` gives; 0: those of CI."""

set_hypothesis_home_dir(os.devnull)  # it would write into the working directory


def budget(examples: int, **options: object) -> settings:
    """Settings of a property: `examples` in CI, where an example that fails is not made smaller."""
    return settings(
        max_examples=examples * max(FACTOR, 1),
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[phase for phase in Phase if FACTOR or phase is not Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **options,
    )
