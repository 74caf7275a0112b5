"""Kernels written for one kind of chip each. Their interfaces and what they must compute: the registries above."""
