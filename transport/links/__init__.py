"""Ways to move bytes between two processes; each keeps the contract of `base.Transport` and imports its library lazily."""
