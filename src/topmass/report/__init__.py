"""Runs in, Markdown and self-contained HTML out. Needs no torch."""

from topmass.report.build import build

__all__ = ["build"]
