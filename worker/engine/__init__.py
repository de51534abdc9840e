"""Step-level continuous batching: tasks in, events out. Knows neither Redis, RQ nor HTTP."""
