"""Runtimes behind one contract (:mod:`backends.api`); nothing is imported until it is asked for."""
