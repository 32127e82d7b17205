"""The ClientApp: what runs on a node that holds data."""
