"""The command `budgetformer`, also `python -m budgetformer`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run the command line of the package `service` that is installed beside this one.

    Since `service` is a common name, first check that no other package shadows ours.
    """
    own = Path(__file__).resolve().parents[1] / "service"
    found = find_spec("service")
    places = [] if found is None else [*(found.submodule_search_locations or [str(found.origin)])]
    if own not in [Path(place).resolve() for place in places]:
        where = ", ".join(places) or "nothing"
        raise SystemExit(
            f"budgetformer: `import service` finds {where} instead of {own}: uninstall the other "
            "distribution, or remove its folder from PYTHONPATH"
        )
    try:
        from service.cli import main as run
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "service":
            raise
        raise SystemExit(
            f"budgetformer: {error}: another distribution has overwritten files in {own}: "
            "uninstall it, then install budgetformer-serving again"
        ) from None
    run()


if __name__ == "__main__":
    main()
