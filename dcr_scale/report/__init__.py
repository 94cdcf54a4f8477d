"""A run's ``report.html``: what changed, how sure that is, and what it cost, in one file that needs no network."""

from dcr_scale.report.write import write_report

__all__ = ["write_report"]
