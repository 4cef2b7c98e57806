"""Ready programs in plain JAX that know nothing of the emulator but the mesh they are given."""
