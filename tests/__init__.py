"""Tests. A package, so that no other `tests` on the path stands in for it."""
