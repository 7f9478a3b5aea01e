"""Defects planted in a correct backend, and how many of them the judge sees: ``python -m suites.selftest.planted``."""
