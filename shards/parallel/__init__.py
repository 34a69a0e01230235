"""Parallel map of one function over many parts: worker processes on this machine, or a Dask cluster."""
