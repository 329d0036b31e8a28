"""Drop-in names of other libraries, one module each."""
