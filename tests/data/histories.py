"""Prints of batches, for tests of their order."""

import hashlib

import numpy as np

from data.pipeline import Batch


def batch_hash(batch: Batch, previous: str = "") -> str:
    """Hash of a batch chained to the hash of what came before: equal values mean equal histories."""
    digest = hashlib.sha256(previous.encode())
    for name in sorted(batch):
        digest.update(np.ascontiguousarray(batch[name]).tobytes())
    return digest.hexdigest()[:16]
