"""`python -m dsv4_jax` is the `dsv4-jax` command."""

import sys

from dsv4_jax.cli import main

sys.exit(main())
