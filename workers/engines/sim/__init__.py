"""The verifying simulator: its KV is real bytes, and each token is a hash of the KV bytes that it finds."""
