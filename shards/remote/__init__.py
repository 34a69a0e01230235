"""Download the shards of a remote set: retries (`folder`), the cache of a node (`cache`), prefetch (`prefetch`).

The path of a download: `Split.start_pass` makes a `prefetch.ShardPrefetcher`, whose `advance(position)` schedules the
next shards of the pass on background threads; these call `cache.CachedSet.download`, as does `Split.read` (through
`Split.open_shard` and `CachedSet.open`) for a shard that is not cached yet. `CachedSet.download` takes the file's lock
among the processes of the node, reserves room in `cache.NodeCache`, which evicts unused files for it, and calls
`folder.RemoteFolder.download`, which copies the bytes through fsspec, retries, and checks length and sha256. The file
is then renamed to its final name. `ShardPrefetcher` releases a shard when the pass is done with it: unmapped and no
longer locked, it may be evicted.
"""
