"""Native kernels for the CPU: the library, and JAX primitives that are lowered to it or to XLA."""
