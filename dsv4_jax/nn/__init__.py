"""The layers of DeepSeek-V4 as NNX modules: constructors declare parameters, calls are pure."""
