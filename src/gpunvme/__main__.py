"""``python -m gpunvme`` is ``gpunvme``."""

from __future__ import annotations

import sys

from gpunvme.cli import main

if __name__ == "__main__":
    sys.exit(main())
