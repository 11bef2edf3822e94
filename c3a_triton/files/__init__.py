"""An adapter as data: configurations, patterns, files."""
