"""The ServerApp: the loop over tasks and rounds."""
