"""`python -m mamba_ssm`: what the package can show and measure on this machine."""

import sys

from mamba_ssm.cli import main

if __name__ == "__main__":
    sys.exit(main())
