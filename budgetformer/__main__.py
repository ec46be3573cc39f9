"""The command `budgetformer`, also `python -m budgetformer`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run the command line of the `service` package installed next to this one.

    The name `service` is common, so this function first checks that no other package shadows it.
    """
    expected = Path(__file__).resolve().parents[1] / "service"
    found = find_spec("service")
    if found is None:
        raise SystemExit(f"budgetformer: {expected} is missing: install budgetformer-serving again")
    locations = found.submodule_search_locations or [str(found.origin)]
    if expected not in [Path(location).resolve() for location in locations]:
        raise SystemExit(
            f"budgetformer: `import service` finds {', '.join(locations)} instead of {expected}: "
            "uninstall the other distribution, or remove its folder from PYTHONPATH"
        )
    try:
        from service.cli import main as run
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "service":
            raise
        raise SystemExit(
            f"budgetformer: {error}: another distribution has probably overwritten files in "
            f"{expected}: uninstall it, then install budgetformer-serving again"
        ) from None
    run()


if __name__ == "__main__":
    main()
