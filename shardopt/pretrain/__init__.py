"""Pretraining a causal language model: config, data, model, loop, tracking, report."""
