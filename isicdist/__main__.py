"""`python -m isicdist` is `isicdist`."""

from isicdist.cli import main

if __name__ == "__main__":
    main()
