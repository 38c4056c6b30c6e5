"""``python -m hessfn`` is the ``hessfn`` command."""

import sys

from hessfn.reporting.cli import main

if __name__ == "__main__":
    sys.exit(main())
