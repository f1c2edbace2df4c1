"""The input of training: texts and columns read, cut into words, counted and kept as ids."""
