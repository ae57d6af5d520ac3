"""Read a signal from recorded activations. Empty in this version; linear probes are next."""
