"""Zero-shot anomaly detection: the images of one category score each other, patch by patch."""
