"""mbnorm in other people's training code: one thin module each, imported by name and where it is used."""
