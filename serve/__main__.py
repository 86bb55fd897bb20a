"""`python -m serve`: the same as `seqfraud serve`."""

import sys

from seqfraud.cli import run

if __name__ == "__main__":
    sys.exit(run("serve", sys.argv[1:]))
