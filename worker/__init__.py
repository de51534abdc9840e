"""The worker: an engine that steps samples of many jobs together, and its adapter to RQ."""
