"""`python -m training`: the same as `seqfraud train`."""

import sys

from seqfraud.cli import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
