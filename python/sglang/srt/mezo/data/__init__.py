"""From files and rows to tokenised examples, and from examples to batches."""
