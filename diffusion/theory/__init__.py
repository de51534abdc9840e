"""Closed forms that tests and figures compare with: exact denoisers, the masking chain."""
