"""The HTTP front end and the supervisor. Importing it never loads torch."""
