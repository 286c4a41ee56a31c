"""``python -m cse_autoloss.cli`` is ``cse-search``."""

from cse_autoloss.cli import main

main()
