"""Frames of kernels for one kind of chip. They know neither the network nor an optimizer, and both use them."""
