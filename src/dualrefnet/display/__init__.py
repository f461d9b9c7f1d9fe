"""How numbers, tables, figures and pages look."""
