"""DeepSeek-V4 in JAX."""
