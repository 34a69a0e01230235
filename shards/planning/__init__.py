"""Which image goes into which split and shard: pure functions of names, options and image hashes."""
