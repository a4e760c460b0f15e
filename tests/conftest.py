import gc
import os

# Before anything imports huggingface_hub, here or in a child: tests never look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# A thread a process: several processes share the cores, and OpenMP's waiting threads keep the others from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Keep collections from looking through a million objects of the modules that are imported by now."""
    gc.collect()
    gc.freeze()
