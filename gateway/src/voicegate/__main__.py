"""`python -m voicegate`."""

from __future__ import annotations

import sys

from voicegate.cli import main

sys.exit(main())
