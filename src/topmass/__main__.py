"""`python -m topmass`."""

import sys

from topmass.cli import main

if __name__ == "__main__":
    sys.exit(main())
