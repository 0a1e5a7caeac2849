"""``python -m tuning SPACE.yaml [overrides]`` is ``raysparse tune``."""

import sys

from raysparse.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
