"""Numbers and words: the noise, the estimator, the optimizer, the seed log, settings, errors. Needs torch and NumPy
only."""
