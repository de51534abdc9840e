"""The HTTP front end: routes, events, and `ddpm up`. Imports jobs, never torch."""
