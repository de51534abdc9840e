"""The engine as a worker of RQ's: every private name of RQ is in here."""
