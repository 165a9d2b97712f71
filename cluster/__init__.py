"""Puts the processes together: the `hocket` command, supervision, the demo model."""
