"""The workers: an engine that steps many jobs together, and its adapter to RQ."""
