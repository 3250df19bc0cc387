"""The built-in scenarios, one file per data set."""
