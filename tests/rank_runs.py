"""Several runs one after another in the same ranks, for a test that would otherwise pay for a launch each.

torchrun --nproc_per_node=2 tests/rank_runs.py FILE       FILE: [[argument, ...], ...]
"""

import json
import sys
from pathlib import Path

from warm import warm

from posttrain.cli import main

if __name__ == "__main__":
    warm()
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        status = main(arguments)
        if status:
            sys.exit(status)
