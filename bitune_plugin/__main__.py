"""`python -m bitune_plugin`: the command line `bitune`."""

import sys

from bitune_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
