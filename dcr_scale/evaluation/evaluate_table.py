"""An evaluation's results as text for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcr_scale.evaluation import rates
from dcr_scale.evaluation.harness import EvaluationResult
from dcr_scale.evaluation.intervals import Interval
from dcr_scale.evaluation.perplexity import Perplexity
from dcr_scale.evaluation.rates import AVERAGED, Rates

# Rates without intervals; the summary has them all.
_BARE = {
    "full_refusal": "in full",
    "degenerate": "degenerate",
    "undetermined": "unclear",
    "string_list_refusal": "by list",
}


def table(result: EvaluationResult, perplexity: Perplexity, tasks: Mapping[str, Any] | None) -> str:
    """Rates by suite and class, averages over suites, perplexity, and accuracy on tasks where there are any."""
    rows = [
        (f"{suite}, {of_class.replace('_', ' ')}", Rates.of(mine))
        for suite, answers in result.answers.items()
        for of_class, mine in rates.by_class(answers).items()
    ]
    single: list[tuple[str, str]] = [
        (AVERAGED[of_class][1], _percent(interval)) for of_class, interval in result.averages().items()
    ]
    ppl = perplexity.interval
    single.append((f"perplexity, {perplexity.examples} general answers", f"{ppl.estimate:.2f}  {_span(ppl, '.2f')}"))
    for task, metrics in (tasks or {}).items():
        single += [(f"{task}, {name}", f"{value:.3f}") for name, value in metrics.items() if isinstance(value, float)]
    width = max(len(title) for title, _ in [*rows, *single])
    lines = [f"{'':<{width}}{'prompts':>9}{'refused':>9}{'95 %':>10}" + "".join(f"{t:>12}" for t in _BARE.values())]
    for title, found in rows:
        refused = found["refusal"]
        bare = "".join(f"{found[name].estimate:>12.0%}" for name in _BARE)
        span = f"{refused.low * 100:.0f}–{refused.high * 100:.0f} %"
        lines.append(f"{title:<{width}}{found.prompts:>9}{refused.estimate:>9.0%}{span:>10}{bare}")
    return "\n".join([*lines, "", *(f"{title:<{width}}{value:>20}" for title, value in single)])


def _percent(interval: Interval) -> str:
    return f"{interval.estimate:.1%}  [{interval.low * 100:.1f}, {interval.high * 100:.1f}]"


def _span(interval: Interval, form: str) -> str:
    return f"[{interval.low:{form}}, {interval.high:{form}}]"
