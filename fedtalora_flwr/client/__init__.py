"""What runs on a node that holds data: handlers of messages, its data, what may leave it."""
