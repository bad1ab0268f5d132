"""`python -m spd_lightning` is the `spd-lightning` command."""

import sys

from spd_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
