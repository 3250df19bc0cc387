"""The command line as ``python -m clframe``."""

import sys

from clframe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
