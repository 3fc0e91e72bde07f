"""Tables, pictures, comparisons and documents of benchmark results."""
