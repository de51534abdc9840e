"""How each kind of job runs: from its record to a task of the engine, and back to outputs."""
