"""GPU kit: checks that a GPU computes what the CPU does, and measures what it reaches; see README.md."""
