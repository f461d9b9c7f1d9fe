"""Pictures: how numbers are drawn. Nothing here computes a result."""
