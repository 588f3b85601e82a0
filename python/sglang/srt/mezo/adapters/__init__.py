"""LoRA adapters as PEFT describes them: their numbers, their files, and the model families that they fit."""
