"""AdEMAMix inside other people's training loops: accelerate (`accelerate.py`) and HF Trainer (`transformers.py`)."""
