"""The application: nets trained on real data with every normalization method, side by side."""
