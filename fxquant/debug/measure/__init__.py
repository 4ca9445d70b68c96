"""The views that run models: compare, profile, sensitivity, and what they stand on."""
