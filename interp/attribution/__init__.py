"""Which heads, layers and edges decide: patching, attribution and attention; all give scores of the same form."""
