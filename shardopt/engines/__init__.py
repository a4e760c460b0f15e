"""Who holds what, and how gradients get there. One file an engine."""
