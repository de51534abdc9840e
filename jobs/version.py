"""The version of this software: the one place that says it (pyproject.toml reads it from here)."""

VERSION = "0.2.0"
