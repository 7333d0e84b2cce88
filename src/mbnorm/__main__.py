"""`python -m mbnorm`."""

import sys

from mbnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
