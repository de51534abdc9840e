"""The kinds of job: what a request may say, what it is checked against, and what it costs."""
