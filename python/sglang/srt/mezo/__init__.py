"""MeZO (arXiv 2305.17333) inside SGLang: fine-tuning with forward passes only."""

__version__ = "0.1.0"
