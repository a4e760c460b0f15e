import os

# Before anything imports huggingface_hub, here or in a child: tests never look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
