"""Implementations of the operator; each stands alone, `mbnorm.functional` chooses between them."""
