"""`ddpm up`: Redis, a worker and the API as children of one process."""
