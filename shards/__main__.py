"""`python -m shards` is `isic-shards`."""

from shards.cli import main

if __name__ == "__main__":
    main()
