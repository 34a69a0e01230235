"""Assign images to splits and shards: pure functions of names, options and image hashes."""
