"""Fine-tuning jobs in the HTTP process: from a request to messages to the scheduler."""
