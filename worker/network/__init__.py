"""A network on a device: batch shapes, their costs, compiled code."""
