"""Built-in scenarios: one file for each data set, or each kind of data."""
