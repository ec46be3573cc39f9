"""Builders of the PromQL queries and of the panels of all dashboards.

Panels of an idle service show 0 instead of "No data": the service exports every series from the
start, so that rates are 0, and divisions by a rate of 0 fall back to 0 with the same labels.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders.bargauge import Panel as BarGauge
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    ScaleDistributionConfig,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.builders.heatmap import (
    HeatmapColorOptions,
    RowsHeatmapOptions,
    YAxisConfig,
)
from grafana_foundation_sdk.builders.heatmap import Panel as Heatmap
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.table import Panel as Table
from grafana_foundation_sdk.builders.text import Panel as Text
from grafana_foundation_sdk.builders.timeseries import Panel as Timeseries
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    DataSourceRef,
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
"""The data source that the dashboard variable selects, because ids differ between Grafanas."""
WINDOW = "$__rate_interval"
MODEL = 'model=~"$model"'
VERSION = f'{MODEL}, version=~"$version"'
FIRST, SECOND = (f'{MODEL}, version=~"${name}"' for name in ("first", "second"))
COMPARED = f'{MODEL}, version=~"$first|$second"'
"""Selects the two versions that a dashboard compares."""
SERVING = 'route=~"/classify|/predict|/|/v2/models/.+/infer|/invocations|grpc ModelInfer"'
"""Selects requests that classify."""

Queries: TypeAlias = dict[str, str]
"""PromQL expressions by legend."""
Panel: TypeAlias = BarGauge | Heatmap | Stat | Table | Text | Timeseries
QueryPanel = TypeVar("QueryPanel", BarGauge, Heatmap, Stat, Table, Timeseries)
Levels: TypeAlias = tuple[float, float]
"""Values from which a panel is orange and red."""


def rate(metric: str, by: str = "", where: str = "", over: str = WINDOW) -> str:
    """Return the summed rate of a counter, by some labels and for some series."""
    grouped = f"sum by ({by})" if by else "sum"
    selected = f"{{{where}}}" if where else ""
    return f"{grouped} (rate(budgetformer_{metric}{selected}[{over}]))"


def share(part: str, whole: str) -> str:
    """Return the quotient of two rates with the same labels; 0 where `whole` is 0."""
    return f"{part} / ({whole} > 0) or 0 * {whole}"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    parts = (rate(f"{histogram}_{part}", by, where) for part in ("sum", "count"))
    return share(*parts)


def quantile(q: float, histogram: str, where: str = "", by: str = "") -> str:
    buckets = rate(f"{histogram}_bucket", f"{by}, le" if by else "le", where)
    idle = f"0 * {rate(f'{histogram}_count', by, where)}" if by else "vector(0)"
    return f"histogram_quantile({q}, {buckets}) >= 0 or {idle}"


def gauge(metric: str, by: str, where: str = "", fold: str = "sum") -> str:
    selected = f"{{{where}}}" if where else ""
    return f"{fold} by ({by}) (budgetformer_{metric}{selected})"


def stat(
    title: str,
    description: str,
    unit: str,
    query: str,
    decimals: int = 1,
    levels: Levels | None = None,
) -> Stat:
    panel = Stat().title(title).description(description).unit(unit).decimals(decimals)
    panel.graph_mode(BigValueGraphMode.AREA).span(4).height(4)
    panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    if levels is not None:
        panel.thresholds(_thresholds(levels))
    return _with_queries(panel, {"": query})


def chart(
    title: str,
    description: str,
    unit: str,
    queries: Queries,
    *,
    stacked: bool = False,
    exemplars: bool = False,
) -> Timeseries:
    panel = Timeseries().title(title).description(description).unit(unit)
    panel.min(0).line_width(1).fill_opacity(30 if stacked else 8).span(8).height(8)
    panel.tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    panel.legend(
        VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    if stacked:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("all"))
    return _with_queries(panel, queries, exemplars=exemplars)


def heat_map(
    title: str, description: str, unit: str, histogram: str, where: str = "", *, log: bool = False
) -> Heatmap:
    """Return a panel of a histogram's buckets over time, with exemplars that link to traces."""
    selected = f"{{{where}}}" if where else ""
    query = f"sum by (le) (increase(budgetformer_{histogram}_bucket{selected}[{WINDOW}]))"
    axis = YAxisConfig().unit(unit)
    if log:
        axis.scale_distribution(ScaleDistributionConfig().type(ScaleDistribution.LOG).log(2))
    panel = Heatmap().title(title).description(description).span(8).height(8).calculate(False)
    panel.y_axis(axis).rows_frame(RowsHeatmapOptions().layout(HeatmapCellLayout.LE))
    panel.color(HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Viridis").steps(64))
    return _with_queries(panel, {"{{le}}": query}, form=PromQueryFormat.HEATMAP, exemplars=True)


def bars(title: str, description: str, unit: str, queries: Queries) -> BarGauge:
    panel = BarGauge().title(title).description(description).unit(unit).min(0).span(8).height(8)
    panel.orientation(VizOrientation.HORIZONTAL)
    panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    return _with_queries(panel, queries, instant=True)


def table(title: str, description: str, query: str, hidden: tuple[str, ...]) -> Table:
    """Return a table of the labels of some series, without the labels in `hidden`."""
    excluded = dict.fromkeys(("Time", "Value", "__name__", *hidden), True)
    panel = Table().title(title).description(description).span(12).height(8)
    panel.with_transformation(
        DataTransformerConfig(id_val="organize", options={"excludeByName": excluded})
    )
    return _with_queries(panel, {"": query}, form=PromQueryFormat.TABLE, instant=True)


def text(title: str, markdown: str) -> Text:
    return Text().title(title).mode(TextMode.MARKDOWN).content(markdown).span(12).height(9)


def _thresholds(levels: Levels) -> ThresholdsConfig:
    colors = ((None, "green"), (levels[0], "orange"), (levels[1], "red"))
    steps = [Threshold(value=value, color=color) for value, color in colors]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _with_queries(
    panel: QueryPanel,
    queries: Queries,
    *,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
    exemplars: bool = False,
    instant: bool = False,
) -> QueryPanel:
    for number, (legend, expression) in enumerate(queries.items()):
        query = Dataquery().ref_id(chr(ord("A") + number)).expr(expression).legend_format(legend)
        query.datasource(DATASOURCE).format(form)
        if exemplars:
            query.exemplar(True)
        panel.with_target(query.instant() if instant else query.range())
    panel.datasource(DATASOURCE)
    return panel
