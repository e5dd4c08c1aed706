"""Is the student any good: kNN, cosine, pyramid, figures, report."""
