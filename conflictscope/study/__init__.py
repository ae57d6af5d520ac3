"""The study engine: what every method is measured by, on the same prompts, so that all numbers compare.

A study asks the model what it knows, lets each method's candidates compete on dev, and measures what was chosen once on
test, paired with the unedited model, next to random controls. ``conflictscope.methods`` holds the methods.
"""
