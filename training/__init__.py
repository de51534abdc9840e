"""Offline tools: training, sampling and conversion on the command line. Imports diffusion."""
