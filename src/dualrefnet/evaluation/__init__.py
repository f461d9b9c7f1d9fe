"""Measures of a run's predictions: one audited definition of each, their intervals, and tables of them."""
