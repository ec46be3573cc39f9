"""Write the Grafana dashboards: `python docker/grafana/generate.py`.

The panels and their queries are in boards.py and panels.py; Grafana reads the generated
`dashboards/*.json`. The runbooks come from docs/runbooks.md.
"""

from __future__ import annotations

from pathlib import Path

from boards import Rows, budgets, engines, models, runbooks, service
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from panels import DATASOURCE, VERSION

HERE = Path(__file__).parent
OUTPUT = HERE / "dashboards"
RUNBOOKS = HERE.parents[1] / "docs" / "runbooks.md"
TAG = "budgetformer"


def variable(name: str, label: str, query: str) -> QueryVariable:
    """Return a dashboard variable with several values, by default all."""
    selector = QueryVariable(name).label(label).datasource(DATASOURCE).query(query)
    selector.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    selector.multi(True).include_all(True).all_value(".*")
    return selector.current(VariableOption(selected=True, text="All", value="$__all"))


def one_version(name: str, label: str, order: VariableSort) -> QueryVariable:
    """Return a variable for one of the versions with metrics in the time range, even if retired."""
    query = 'label_values(budgetformer_model_requests_total{model=~"$model"}, version)'
    selector = QueryVariable(name).label(label).datasource(DATASOURCE).query(query)
    return selector.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(order)


def annotation(name: str, color: str, query: str) -> AnnotationQuery:
    return (
        AnnotationQuery()
        .name(name)
        .enable(True)
        .icon_color(color)
        .datasource(DATASOURCE)
        .expr(query)
    )


def empty(name: str, title: str, description: str) -> Dashboard:
    """Return a dashboard with links to the others, without panels."""
    dashboard = Dashboard(f"BudgetFormer: {title}").uid(f"budgetformer-{name}").tags([TAG])
    dashboard.description(description).readonly().timezone("browser")
    dashboard.link(
        DashboardLink("Dashboards")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .keep_time(True)
        .include_vars(True)
    )
    return dashboard.link(
        DashboardLink("Runbooks")
        .type(DashboardLinkType.LINK)
        .url("/d/budgetformer-runbooks")
        .icon("doc")
        .tooltip("The meaning of each alert, and what to do")
    )


def board(name: str, title: str, description: str, rows: Rows) -> Dashboard:
    dashboard = empty(name, title, description)
    dashboard.refresh("10s").time("now-30m", "now").tooltip(DashboardCursorSync.CROSSHAIR)
    source = DatasourceVariable("datasource").label("Data source").type("prometheus")
    dashboard.with_variable(source)
    model = "label_values(budgetformer_model_info, model)"
    version = 'label_values(budgetformer_model_info{model=~"$model"}, version)'
    dashboard.with_variable(variable("model", "Model", model))
    dashboard.with_variable(variable("version", "Version", version))
    served = f"budgetformer_model_info{{{VERSION}}}"
    lowered = "budgetformer_quality_level < budgetformer_quality_level_configured"
    dashboard.annotation(annotation("Model loads", "blue", f"{served} unless {served} offset 1m"))
    dashboard.annotation(annotation("Brown-outs", "orange", lowered))
    for row, panels in rows.items():
        dashboard.with_row(Row(row))
        for panel in panels:
            dashboard.with_panel(panel)
    return dashboard


def compare_versions(dashboard: Dashboard) -> Dashboard:
    """Add variables for the two versions to compare, by default the lowest and the highest."""
    dashboard.with_variable(one_version("first", "Compare", VariableSort.NUMERICAL_ASC))
    return dashboard.with_variable(one_version("second", "With", VariableSort.NUMERICAL_DESC))


def build() -> dict[str, Dashboard]:
    """Return the dashboards by file name."""
    texts = empty("runbooks", "Runbooks", "The meaning of each alert, and what to do.")
    for panel in runbooks(RUNBOOKS.read_text(encoding="utf-8")):
        texts.with_panel(panel)
    return {
        "service": board(
            "service",
            "Service",
            "Errors, latency, load and limits of the service.",
            service(),
        ),
        "budgets": board(
            "budgets", "Budgets", "Compute that texts take and that budgets save.", budgets()
        ),
        "engines": board(
            "engines", "Engine and models", "Engine processes and served models.", engines()
        ),
        "models": compare_versions(
            board("models", "Models", "Each model, and a comparison of two versions.", models())
        ),
        "runbooks": texts,
    }


def render() -> dict[Path, str]:
    """Return the content of every dashboard file."""
    files = {}
    for name, builder in build().items():
        dashboard = builder.build()
        for number, panel in enumerate(dashboard.panels or [], start=1):
            panel.id_val = number
        written = JSONEncoder(sort_keys=True, indent=2).encode(dashboard)
        files[OUTPUT / f"{name}.json"] = f"{written}\n"
    return files


if __name__ == "__main__":
    for path, written in render().items():
        path.write_text(written, encoding="utf-8")
