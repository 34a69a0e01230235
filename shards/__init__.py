"""Pack images and masks into WebDataset tar shards, and read any sample of them by its number."""
