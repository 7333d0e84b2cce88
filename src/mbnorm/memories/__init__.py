"""The memories of past statistics: what they hold, how they are read, and what a forward leaves in them."""
