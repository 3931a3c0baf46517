"""``python -m fastdiff`` is the command ``fastdiff``."""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
