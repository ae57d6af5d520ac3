"""Ask a model live: what there is to see about one question, and the page that shows it."""
