"""Other authors' ways to normalize with small batches, to compare with."""
