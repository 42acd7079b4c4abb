"""A run as one HTML file: verdict, tables, pictures, scores, training and cost."""

from mitune.report.build import build_report

__all__ = ["build_report"]
