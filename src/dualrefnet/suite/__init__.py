"""Suites: a grid of recipes trained by one command, and the tables made from their runs."""
