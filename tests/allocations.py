"""How much memory a block of code takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Peak:
    """The most memory that was held at one time."""

    nbytes = 0
    """Of what was allocated in the block, without what was freed again."""


@contextmanager
def peak_of_cpu_memory() -> Iterator[Peak]:
    """Count what torch allocates on the CPU within the block; the number is there after it."""
    peak, held = Peak(), 0
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield peak
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak.nbytes = max(peak.nbytes, held)
