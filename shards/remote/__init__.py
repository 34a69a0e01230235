"""Download the shards of a remote set: retries, the cache of a node, prefetch."""
