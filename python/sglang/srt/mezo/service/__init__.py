"""Fine-tuning inside a running server: jobs, the OpenAI routes, and the trainer in the scheduler."""
