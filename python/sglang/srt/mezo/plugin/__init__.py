"""What SGLang loads: the entry points, and every hook into its processes."""
