"""Paired evaluation of selectors on synthetic long-context tasks."""
