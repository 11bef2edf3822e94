"""`python -m c3a_triton`: the command `c3a-triton`."""

import sys

from .cli import main

sys.exit(main())
