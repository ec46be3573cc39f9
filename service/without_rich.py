"""Prevent the import of rich, to save some megabytes in each process; import this module first.

structlog imports rich, if it is installed, for coloured tracebacks, which a server never prints. An
import fails if the module's entry in `sys.modules` is None.
"""

from __future__ import annotations

import sys
from typing import Any, cast

cast(dict[str, Any], sys.modules)["rich"] = None
