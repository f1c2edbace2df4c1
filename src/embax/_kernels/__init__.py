"""Native kernels for the CPU: the library, and the primitives whose lowering chooses between it and XLA."""
