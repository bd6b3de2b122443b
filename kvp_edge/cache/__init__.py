"""Which tokens stay: limits, the table of what is held, selection, and the manager of evictions."""
