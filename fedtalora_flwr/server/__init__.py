"""The server's side of a run: who is there, what is exchanged, what is taken in, the loop over rounds."""
