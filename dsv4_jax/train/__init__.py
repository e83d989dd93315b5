"""Training a small DeepSeek-V4: its data, forward pass, loss and release in the official format."""
