"""`python -m export`: the same as `seqfraud export`."""

import sys

from seqfraud.cli import run

if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))
