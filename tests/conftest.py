import gc
import os
from collections import Counter

import pytest

# Before anything imports huggingface_hub, here or in a child: tests never look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# A thread a process: several processes share the cores, and OpenMP's waiting threads keep the others from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Workers that take whole files begin with these, so that none is left alone with one at the end.
LONGEST = [
    "tests/distributed/test_deepspeed.py",
    "tests/distributed/test_pretrain.py",
    "tests/test_readme.py",
    "tests/integrations/test_trainer.py",
    "tests/engines/test_native.py",
    "tests/distributed/test_zero.py",
    "tests/integrations/test_launch.py",
    "tests/engines/test_compile.py",
    "tests/distributed/test_kills.py",
    "tests/pretrain/test_branch.py",
    "tests/pretrain/test_spikes.py",
    "tests/integrations/test_trainer_folders.py",
    "tests/test_wheels.py",
    "tests/distributed/test_frozen.py",
    "tests/distributed/test_started.py",
    "tests/integrations/test_accelerate.py",
    "tests/pretrain/test_figures.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(file_of(item.nodeid), len(order)))


def file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Beside pytest's slowest tests, where asked for, the slowest files."""
    count = terminalreporter.config.getoption("durations")
    if not count:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            seconds[file_of(report.nodeid)] += getattr(report, "duration", 0.0)
    terminalreporter.section(f"slowest {count} files")
    for file, spent in seconds.most_common(count):
        terminalreporter.line(f"{spent:.2f}s {file}")


def pytest_collection_finish() -> None:
    """Keep collections from looking through a million objects of the modules that are imported by now."""
    gc.collect()
    gc.freeze()
