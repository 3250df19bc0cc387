"""The built-in plugins, one file per method, named as the method."""
