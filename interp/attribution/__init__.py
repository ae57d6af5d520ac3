"""Which heads decide: path patching, direct logit attribution, attribution patching; all give HeadScores."""
