"""An app whose messages hold nothing."""
