"""`mbnorm bench`: how fast the layers and whole training steps are beside torch's own."""
