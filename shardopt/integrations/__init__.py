"""AdEMAMix inside other people's training: a file for each framework (`transformers.py` is for HF Trainer)."""
