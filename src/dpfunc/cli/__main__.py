"""`python -m dpfunc.cli`."""

import sys

from dpfunc.cli import main

if __name__ == "__main__":
    sys.exit(main())
