"""Run one function over many parts, on processes of this machine or on a Dask cluster."""
