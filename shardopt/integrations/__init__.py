"""AdEMAMix inside other people's training: accelerate, HF Trainer (`transformers.py`) and torchtitan, a file each."""
