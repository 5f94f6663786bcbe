"""The class-conditional generator: a plain Llama over channel tokens, and its cached stream."""
