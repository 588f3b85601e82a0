"""Attention, LoRA and linear layers for CPUs, in C with plain PyTorch beside it."""
