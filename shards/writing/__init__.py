"""From checked pairs to published shards, sample tables and the index."""
