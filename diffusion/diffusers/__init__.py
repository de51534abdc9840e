"""Folders of the diffusers library: read, checked field by field, and written."""
