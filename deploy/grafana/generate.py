"""Write the Grafana dashboard, from what the panels are to ask and to show.

``python deploy/grafana/generate.py`` rewrites ``dashboards/vtprune.json`` beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, stat, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

OUTPUT = Path(__file__).parent / "dashboards" / "vtprune.json"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTORS = {
    "MODEL": 'model_name=~"$model_name",job=~"$job",instance=~"$instance"',
    "INSTANCES": 'job=~"$job",instance=~"$instance"',
    "RULES": 'model_name=~"$model_name"',  # recorded series have no instance
}
"""What the words in capitals in the queries stand for: what the variables at the top of the dashboard select."""

Plot: TypeAlias = timeseries.Panel | stat.Panel | heatmap.Panel


@dataclass(frozen=True)
class Query:
    """One query of a panel, and what to call its series."""

    expr: str
    legend: str = ""


def query(query: Query, index: int, *, buckets: bool = False) -> Dataquery:
    """A query with the templates in it filled in."""
    built = Dataquery().ref_id(chr(ord("A") + index)).legend_format(query.legend).datasource(DATASOURCE)
    expr = query.expr
    for name, selectors in SELECTORS.items():
        expr = expr.replace(name, selectors)
    built.expr(expr)
    if buckets:
        built.format(PromQueryFormat.HEATMAP)
    return built.range()


def finish(panel: Plot, title: str, description: str, unit: str, width: int, height: int) -> Plot:
    return panel.title(title).description(description).unit(unit).span(width).height(height).datasource(DATASOURCE)


def lines(title: str, description: str, unit: str, *queries: Query, width: int = 8, stacked: bool = False) -> Plot:
    """Series over time."""
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    legend.display_mode(common.LegendDisplayMode.LIST).calcs(["lastNotNull"])
    panel = timeseries.Panel().min(0).legend(legend).fill_opacity(20 if stacked else 0)
    panel.tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    panel.line_width(1).show_points(common.VisibilityMode.NEVER)
    if stacked:
        panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    for index, source in enumerate(queries):
        panel.with_target(query(source, index))
    return finish(panel, title, description, unit, width, 8)


def tile(title: str, description: str, unit: str, expr: str, *, decimals: float = 2) -> Plot:
    """One number with its course."""
    panel = stat.Panel().decimals(decimals).no_value("no data").graph_mode(common.BigValueGraphMode.AREA)
    panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    return finish(panel.with_target(query(Query(expr), 0)), title, description, unit, 4, 4)


def distribution(title: str, description: str, unit: str, expr: str) -> Plot:
    """The buckets of a histogram over time."""
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Spectral").steps(64).reverse(False)
    panel = heatmap.Panel().calculate(False).color(colours).cell_gap(1)
    panel.y_axis(heatmap.YAxisConfig().unit(unit))
    panel.with_target(query(Query(expr, "{{le}}"), 0, buckets=True))
    return finish(panel, title, description, unit, 8, 8)


def quantile(share: float, metric: str, selector: str = "MODEL", by: str = "") -> str:
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({groups}) (rate({metric}_bucket{{{selector}}}[$__rate_interval])))"


def ratio(part: str, whole: str) -> str:
    return f"sum(rate({part}[$__rate_interval])) / sum(rate({whole}[$__rate_interval]))"


def savings() -> list[Plot]:
    """What pruning does, and what it saves."""
    before, kept = "vtprune:visual_tokens_total{MODEL}", "vtprune:visual_tokens_kept_total{MODEL}"
    first_token = "vtprune:time_to_first_token_seconds"
    return [
        tile(
            "Kept",
            "Share of visual tokens that entered prefill, unpruned images included. "
            "Metric: `vtprune:visual_tokens_kept_total`",
            units.PercentUnit,
            ratio(kept, before),
        ),
        tile(
            "Tokens saved",
            "Visual tokens per second that were not prefilled. Metric: `vtprune:visual_tokens_total`",
            "tokens/s",
            f"sum(rate({before}[$__rate_interval])) - sum(rate({kept}[$__rate_interval]))",
            decimals=0,
        ),
        tile(
            "Prefill saved",
            "Seconds of prefill saved per second: tokens saved, times the current prefill time per token. "
            "Tokens that the prefix cache would have held count as saved. "
            "Rule: `model:vtprune_prefill_saved_seconds:rate5m`",
            units.Seconds,
            "sum(model:vtprune_prefill_saved_seconds:rate5m{RULES})",
            decimals=3,
        ),
        tile(
            "Plan cost",
            "Time for selecting tokens, as a share of the prefill that it saves; an alert fires above a tenth. "
            "Rule: `model:vtprune_plan_cost:ratio_rate5m`",
            units.PercentUnit,
            "max(model:vtprune_plan_cost:ratio_rate5m{RULES})",
        ),
        tile(
            "First token, pruned",
            f"Median time to first token of requests with images of which some were pruned. Metric: `{first_token}`",
            units.Seconds,
            quantile(0.5, first_token, 'MODEL,method!="none"'),
            decimals=3,
        ),
        tile(
            "First token, unpruned",
            f"The same for requests whose images were all unpruned. Metric: `{first_token}`",
            units.Seconds,
            quantile(0.5, first_token, 'MODEL,method="none"'),
            decimals=3,
        ),
        lines(
            "Visual tokens",
            "Before pruning and after. Metrics: `vtprune:visual_tokens_total`, `vtprune:visual_tokens_kept_total`",
            "tokens/s",
            Query(f"sum(rate({before}[$__rate_interval]))", "before"),
            Query(f"sum(rate({kept}[$__rate_interval]))", "after"),
        ),
        lines(
            "Tokens saved by method",
            "`none`: images served unpruned. Metric: `vtprune:visual_tokens_total`",
            "tokens/s",
            Query(
                f"sum by (method) (rate({before}[$__rate_interval]))"
                f" - sum by (method) (rate({kept}[$__rate_interval]))",
                "{{method}}",
            ),
            stacked=True,
        ),
        lines(
            "Prefill saved and spent",
            "Seconds per second. Spent: on text, budget and selection; not on the vision encoder, "
            "which the engine would run anyway. Rules: `model:vtprune_prefill_saved_seconds:rate5m`, "
            "`model:vtprune_plan_seconds:rate5m`",
            units.Seconds,
            Query("model:vtprune_prefill_saved_seconds:rate5m{RULES}", "saved, {{model_name}}"),
            Query("model:vtprune_plan_seconds:rate5m{RULES}", "spent, {{model_name}}"),
        ),
        distribution(
            "Keep ratio",
            "Kept tokens / visual tokens, per image. Metric: `vtprune:keep_ratio`",
            units.PercentUnit,
            "sum by (le) (increase(vtprune:keep_ratio_bucket{MODEL}[$__rate_interval]))",
        ),
        lines(
            "Images by method",
            "Metric: `vtprune:keep_ratio`",
            "images/s",
            Query("sum by (method) (rate(vtprune:keep_ratio_count{MODEL}[$__rate_interval]))", "{{method}}"),
            stacked=True,
        ),
        lines(
            "Tokens saved by preset",
            "`custom`: a policy written out, `mixed`: several policies in one request, `none`: no policy. "
            "Metric: `vtprune:visual_tokens_total`",
            "tokens/s",
            Query(
                f"sum by (preset) (rate({before}[$__rate_interval]))"
                f" - sum by (preset) (rate({kept}[$__rate_interval]))",
                "{{preset}}",
            ),
            stacked=True,
        ),
    ]


def first_token() -> list[Plot]:
    """Time to first token, of requests with images."""
    metric = "vtprune:time_to_first_token_seconds"
    pruned, unpruned = 'MODEL,method!="none"', 'MODEL,method="none"'
    return [
        lines(
            "Pruned and unpruned",
            "From the arrival of a request with images to its first token. The two are different requests, maybe with "
            f"different images and at different times: this is no experiment. Metric: `{metric}`",
            units.Seconds,
            *[
                Query(quantile(share, metric, which), f"{name}, p{share * 100:g}")
                for name, which in (("pruned", pruned), ("unpruned", unpruned))
                for share in (0.5, 0.95)
            ],
            width=12,
        ),
        lines(
            "Median by share kept",
            f"In bands of tokens kept / visual tokens. Metric: `{metric}`",
            units.Seconds,
            Query(quantile(0.5, metric, by="keep_ratio"), "{{keep_ratio}}"),
            width=12,
        ),
    ]


def cost() -> list[Plot]:
    """What pruning takes, in time and memory."""
    stages = "vtprune:stage_seconds"
    hits, misses = "vtprune:feature_cache_hits_total{MODEL}", "vtprune:feature_cache_misses_total{MODEL}"
    hits_per_second, misses_per_second = (f"sum(rate({name}[$__rate_interval]))" for name in (hits, misses))
    return [
        lines(
            "Stages, median",
            f"For all images of a request. Metric: `{stages}`",
            units.Seconds,
            Query(quantile(0.5, stages, by="stage"), "{{stage}}"),
        ),
        lines(
            "Stages, p95",
            f"For all images of a request. Metric: `{stages}`",
            units.Seconds,
            Query(quantile(0.95, stages, by="stage"), "{{stage}}"),
        ),
        lines(
            "Time spent on plans",
            "Seconds per second, without the vision encoder. Metric: `vtprune:stage_seconds`",
            units.Seconds,
            Query(
                "sum by (model_name) (rate("
                'vtprune:stage_seconds_sum{MODEL,stage=~"text|budget|select"}[$__rate_interval]))',
                "{{model_name}}",
            ),
        ),
        lines(
            "Feature cache",
            "Images served from the feature cache, and images encoded. "
            "Metrics: `vtprune:feature_cache_hits_total`, `vtprune:feature_cache_misses_total`",
            "images/s",
            Query(hits_per_second, "cached"),
            Query(misses_per_second, "encoded"),
        ),
        lines(
            "Feature cache, memory",
            "Of all processes of an instance together. Metric: `vtprune:feature_cache_bytes`",
            units.BytesIEC,
            Query("vtprune:feature_cache_bytes{MODEL}", "{{instance}}"),
        ),
        lines(
            "Images encoded together",
            "Mean over the runs of the vision encoder. Metric: `vtprune:encode_batch_size`",
            units.Short,
            Query(ratio("vtprune:encode_batch_size_sum{MODEL}", "vtprune:encode_batch_size_count{MODEL}"), "mean"),
        ),
    ]


def trouble() -> list[Plot]:
    """What was not pruned, refused or failed."""
    return [
        lines(
            "Bypasses",
            "Images left unpruned although a policy applied. Metric: `vtprune:bypass_total`",
            "images/s",
            Query("sum by (reason) (rate(vtprune:bypass_total{MODEL}[$__rate_interval]))", "{{reason}}"),
            stacked=True,
        ),
        lines(
            "Refusals",
            "Requests refused because of their policy or an image. Metric: `vtprune:errors_total`",
            "requests/s",
            Query("sum by (reason) (rate(vtprune:errors_total{MODEL}[$__rate_interval]))", "{{reason}}"),
            stacked=True,
        ),
        lines(
            "Outcomes",
            "By outcome; `refused`: 4xx, `failed`: 5xx (both also within a stream), `aborted`: the client left. "
            "Metric: `vtprune:requests_total`",
            "requests/s",
            Query("sum by (outcome) (rate(vtprune:requests_total{MODEL}[$__rate_interval]))", "{{outcome}}"),
            stacked=True,
        ),
        lines(
            "HTTP",
            "All requests except health and metrics. Metric: `http_requests_total`",
            "requests/s",
            Query("sum by (status) (rate(http_requests_total{INSTANCES}[$__rate_interval]))", "{{status}}"),
            stacked=True,
        ),
        lines(
            "Uptime",
            "Time since each server began to answer. Metric: `vtprune:start_time_seconds`",
            units.Seconds,
            Query("time() - vtprune:start_time_seconds{MODEL}", "{{instance}}"),
        ),
        lines(
            "Restarts of encoder processes",
            "Within five minutes, of servers with several API processes. Metric: `vtprune:encoder_restarts_total`",
            units.Short,
            Query("increase(vtprune:encoder_restarts_total{MODEL}[5m])", "{{instance}}"),
        ),
    ]


def engine() -> list[Plot]:
    """The engine behind it; vLLM's own dashboards say more."""
    return [
        lines(
            "KV cache",
            "Share in use. Metric: `vllm:kv_cache_usage_perc`",
            units.PercentUnit,
            Query("vllm:kv_cache_usage_perc{MODEL}", "{{instance}}, engine {{engine}}"),
        ),
        lines(
            "Requests",
            "Before the engine, requests wait until their images are loaded, encoded and pruned. "
            "Metrics: `vtprune:requests_waiting`, `vllm:num_requests_waiting`, `vllm:num_requests_running`",
            units.Short,
            Query("sum(vtprune:requests_waiting{MODEL})", "waiting for their images"),
            Query("sum(vllm:num_requests_waiting{MODEL})", "waiting for the engine"),
            Query("sum(vllm:num_requests_running{MODEL})", "running"),
        ),
        lines(
            "Prefix cache",
            "Share of prompt tokens that were cached. "
            "Metrics: `vllm:prefix_cache_hits_total`, `vllm:prefix_cache_queries_total`",
            units.PercentUnit,
            Query(ratio("vllm:prefix_cache_hits_total{MODEL}", "vllm:prefix_cache_queries_total{MODEL}"), "found"),
        ),
    ]


def variable(name: str, label: str, metric: str) -> builders.QueryVariable:
    built = builders.QueryVariable(name).label(label).datasource(DATASOURCE)
    built.query({"query": f"label_values({metric},{name})", "refId": name})
    built.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    return built.multi(True).include_all(True).all_value(".*")


def link_to_vllm() -> builders.DashboardLink:
    link = builders.DashboardLink("vLLM").type(DashboardLinkType.DASHBOARDS).tags(["vllm"]).as_dropdown(True)
    return link.include_vars(True).keep_time(True).tooltip("vLLM's own dashboards, which carry the tag vllm")


def dashboard() -> str:
    """The dashboard as JSON."""
    board = builders.Dashboard("Visual token pruning").uid("vtprune").tags(["vtprune", "vllm-plugin"])
    board.description("What vllm-vtprune prunes, saves and costs.").refresh("10s").time("now-30m", "now")
    board.tooltip(DashboardCursorSync.CROSSHAIR).editable().link(link_to_vllm())
    board.with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    board.with_variable(variable("job", "Job", "vtprune:build_info"))
    board.with_variable(variable("instance", "Instance", "vtprune:build_info"))
    board.with_variable(variable("model_name", "Model", "vtprune:build_info"))
    rows: Sequence[tuple[str, list[Plot]]] = [
        ("Savings", savings()),
        ("Time to first token", first_token()),
        ("Cost", cost()),
        ("Trouble", trouble()),
        ("Engine", engine()),
    ]
    identifier = 0
    for title, panels in rows:
        identifier += 1
        board.with_row(builders.Row(title).id(identifier))
        for panel in panels:
            identifier += 1
            board.with_panel(panel.id(identifier))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def main() -> None:
    argparse.ArgumentParser(description="Write the Grafana dashboard.").parse_args()
    OUTPUT.write_text(dashboard())


if __name__ == "__main__":
    main()
