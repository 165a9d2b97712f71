"""The router: chooses workers, publishes jobs and streams answers; floor 1 over `bus`."""
