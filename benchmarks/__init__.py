"""Side-by-side measurements. Each module runs on its own and prints one JSON line last."""

import json
from collections.abc import Mapping
from typing import Any


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what was measured: as a line of JSON, and before that, unless it is all that is wanted, a line a number."""
    if not as_json:
        for name, value in result.items():
            print(f"{name:<44}{value}")
    print(json.dumps(result))
