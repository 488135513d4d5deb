"""`python -m bench.report`: the tables and figures of the documentation, from the files that hold the numbers."""

import sys

from bench.report.pages import main

sys.exit(main(sys.argv[1:]))
