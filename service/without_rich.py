"""Imported first by the processes of which a server has many, so that they hold less.

structlog imports rich where it is installed, for tracebacks in colours, which no server prints:
some megabytes for each process. A module that is None is one that cannot be imported.
"""

from __future__ import annotations

import sys
from typing import Any, cast

cast(dict[str, Any], sys.modules)["rich"] = None
