"""The training loop, its run directory, its evaluations, and a whole run from a model's name to an adapter."""
