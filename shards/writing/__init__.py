"""Encode pairs, write the shards, and publish the sample tables and the index."""
