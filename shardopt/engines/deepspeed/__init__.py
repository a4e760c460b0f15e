"""Our optimizers inside DeepSpeed's ZeRO-1, 2 and 3."""
