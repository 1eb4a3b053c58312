"""``python -m memconsole``: the command line."""

import sys

from memconsole.cli import main

if __name__ == "__main__":
    sys.exit(main())
