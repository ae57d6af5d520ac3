"""Read a signal from recorded activations: linear probes, conflict detectors, features of autoencoders."""
