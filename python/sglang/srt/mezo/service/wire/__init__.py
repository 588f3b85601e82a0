"""What the HTTP process and the scheduler say to each other, and what both must know."""
