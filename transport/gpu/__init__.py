"""KV in the memory of an NVIDIA GPU: gathered into, and scattered out of, staging memory by one Triton kernel.

Only these modules know torch and Triton, and nothing imports them but who has a GPU (`pool.CudaKvPool`).
"""
