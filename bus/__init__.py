"""The control plane: messages, subjects and the NATS client that carries them; floor 0, imports nothing of the house."""
