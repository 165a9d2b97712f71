"""Engines: what runs the model. `base` is the contract, `sim` the verifying simulator, `vllm` the real thing."""
