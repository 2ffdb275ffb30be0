"""``python -m tdeconv``."""

import sys

from tdeconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
