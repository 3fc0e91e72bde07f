"""From an adapted model to files that can be deployed: one step a file."""
