import sys

from fastops.benchmarks.scoreboard import command

sys.exit(command.run(command.parser().parse_args()))
