"""Side-by-side measurements. Each module runs on its own and prints one JSON line last."""
