"""Pretraining a causal language model: config, data, model, loop, metrics, report."""
