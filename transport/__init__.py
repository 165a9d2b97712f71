"""The data plane: KV blocks between processes; floor 0, imports nothing of the house."""
