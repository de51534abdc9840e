"""The version of the client: that of the service it was made with."""

VERSION = "0.2.0"
