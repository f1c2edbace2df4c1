"""The engines of training: a native kernel and a program of XLA."""
