"""The seam to SGLang's runtime: the engine, its KV pool and radix tree, its LoRA slots, its chat templates."""
