"""The program sglang-mezo."""
