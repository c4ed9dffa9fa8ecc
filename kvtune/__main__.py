"""python -m kvtune: the command line without an installed command."""

import sys

from kvtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
