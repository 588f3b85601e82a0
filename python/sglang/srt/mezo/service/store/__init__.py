"""What a server keeps on disk: files, jobs and adapters."""
