"""`fastops-run` of the package: the command that lies beside it."""

import os
import sys
from pathlib import Path


def main() -> None:
    """Becomes the command."""
    command = Path(__file__).with_name("fastops-run")
    os.execv(command, [str(command), *sys.argv[1:]])
