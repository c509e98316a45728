"""`python -m pipeline` is the console script `layer61`."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
