"""Optimizers: what a step does to the elements held here. Nothing in this package communicates."""
