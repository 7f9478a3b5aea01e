"""Rows -> tables, plots, HTML and CI verdicts; recorded and published rows as data."""
