"""``python -m bootgrad``: the command ``bootgrad``, where its folder is not on the path."""

import sys

from .cli import main

sys.exit(main())
