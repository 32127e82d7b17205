"""A finished run's model: opened, asked for predictions, exported."""
